"""The released key layout (InternVLChatModel + VAR, as in `inclusionAI/ARGenSeg-8B`) and ours, both ways.

Packed attention projections are split: `wqkv` holds, for each key-value head, its query heads, then k, then v; the
vision tower's `qkv` holds thirds. The released `image_tokenizer.*` becomes a `VARTokenizer` of its own; its quantizer
is also copied into the model.

Whole folders, either way: `python -m modeling_argenseg.conversion_argenseg --help`.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig

from .configuration_argenseg import ARGenSegConfig, VARTokenizerConfig

TOKENIZER_PREFIX = "image_tokenizer."
QUANTIZER_PREFIX = "image_tokenizer.quantize."

# released name (a template with {n} for the layer) -> ours, for everything that keeps its shape
_VISION = "model.vlm.vision_tower."
_PROJECTOR = "model.vlm.multi_modal_projector."
_TEXT = "model.vlm.language_model."
_RENAMES: dict[str, str] = {
    "vision_model.embeddings.class_embedding": _VISION + "embeddings.cls_token",
    "vision_model.embeddings.position_embedding": _VISION + "embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding": _VISION + "embeddings.patch_embeddings.projection",
    "vision_model.encoder.layers.{n}.ls1": _VISION + "encoder.layer.{n}.lambda_1",
    "vision_model.encoder.layers.{n}.ls2": _VISION + "encoder.layer.{n}.lambda_2",
    "vision_model.encoder.layers.{n}.attn.proj": _VISION + "encoder.layer.{n}.attention.projection_layer",
    "vision_model.encoder.layers.{n}.mlp.fc1": _VISION + "encoder.layer.{n}.mlp.fc1",
    "vision_model.encoder.layers.{n}.mlp.fc2": _VISION + "encoder.layer.{n}.mlp.fc2",
    "vision_model.encoder.layers.{n}.norm1": _VISION + "encoder.layer.{n}.layernorm_before",
    "vision_model.encoder.layers.{n}.norm2": _VISION + "encoder.layer.{n}.layernorm_after",
    "mlp1.0": _PROJECTOR + "layer_norm",
    "mlp1.1": _PROJECTOR + "linear_1",
    "mlp1.3": _PROJECTOR + "linear_2",
    "language_model.model.tok_embeddings": _TEXT + "embed_tokens",
    "language_model.model.norm": _TEXT + "norm",
    "language_model.model.layers.{n}.attention.wo": _TEXT + "layers.{n}.self_attn.o_proj",
    "language_model.model.layers.{n}.feed_forward.w1": _TEXT + "layers.{n}.mlp.gate_proj",
    "language_model.model.layers.{n}.feed_forward.w3": _TEXT + "layers.{n}.mlp.up_proj",
    "language_model.model.layers.{n}.feed_forward.w2": _TEXT + "layers.{n}.mlp.down_proj",
    "language_model.model.layers.{n}.attention_norm": _TEXT + "layers.{n}.input_layernorm",
    "language_model.model.layers.{n}.ffn_norm": _TEXT + "layers.{n}.post_attention_layernorm",
    "language_model.output": "lm_head",
    "word_embed": "model.generation_projector.0",
    "lvl_embed": "model.scale_embedding",
}
_PACKED = {
    "vision_model.encoder.layers.{n}.attn.qkv": _VISION + "encoder.layer.{n}.attention.",
    "language_model.model.layers.{n}.attention.wqkv": _TEXT + "layers.{n}.self_attn.",
}
_POSITIONS = ("pos_1LC", "model.position_embedding.weight")
_ONE_SQUASHED_TILE = {
    "ps_version": "v2", "dynamic_image_size": False, "min_dynamic_patch": 1, "max_dynamic_patch": 1,
    "use_thumbnail": True, "pad2square": False,
}  # fmt: skip
# fields of the two sub-configurations that both sides call the same
_TEXT_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps initializer_range"
).split()
_VISION_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size "
    "hidden_act layer_norm_eps norm_type attention_dropout initializer_range"
).split()


def _template(key: str) -> tuple[str, str, str]:
    """`a.layers.3.b.weight` -> (`a.layers.{n}.b`, `3`, `.weight`); keys without a suffix keep ``."""
    stem, dot, leaf = key.rpartition(".")
    if leaf not in ("weight", "bias"):
        stem, dot, leaf = key, "", ""
    layer = re.search(r"\.layers?\.(\d+)\.", stem)
    number = layer.group(1) if layer else ""
    if layer:
        stem = stem[: layer.start(1)] + "{n}" + stem[layer.end(1) :]
    return stem, number, dot + leaf


def split_packed(packed: torch.Tensor, config: ARGenSegConfig, vision: bool) -> dict[str, torch.Tensor]:
    """A packed projection (rows, ...) as `q_proj`, `k_proj`, `v_proj`."""
    if vision:
        q, k, v = packed.chunk(3)
        return {"q_proj": q, "k_proj": k, "v_proj": v}
    kv_heads = config.text_config.num_key_value_heads
    groups = packed.unflatten(0, (kv_heads, -1, config.text_config.head_dim))  # (kv heads, q heads each + 2, d, ...)
    parts = {"q_proj": groups[:, :-2], "k_proj": groups[:, -2], "v_proj": groups[:, -1]}
    return {name: part.reshape(-1, *packed.shape[1:]) for name, part in parts.items()}


def join_packed(parts: Mapping[str, torch.Tensor], config: ARGenSegConfig, vision: bool) -> torch.Tensor:
    """Inverse of `split_packed`."""
    if vision:
        return torch.cat([parts["q_proj"], parts["k_proj"], parts["v_proj"]])
    kv_heads, head_dim = config.text_config.num_key_value_heads, config.text_config.head_dim
    grouped = [parts[name].unflatten(0, (kv_heads, -1, head_dim)) for name in ("q_proj", "k_proj", "v_proj")]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def convert_tensor(key: str, tensor: torch.Tensor, config: ARGenSegConfig) -> dict[str, torch.Tensor]:
    """One released tensor under our names: for the model, none (VAR encoder, decoder), one or three.

    Raises:
        KeyError: the name is not one of the released layout.
    """
    if key == _POSITIONS[0]:
        return {_POSITIONS[1]: tensor[0]}
    if key.startswith(QUANTIZER_PREFIX):
        return {"model.quantizer." + key[len(QUANTIZER_PREFIX) :]: tensor}
    if key.startswith(TOKENIZER_PREFIX):
        return {}
    stem, number, leaf = _template(key)
    if stem in _PACKED:
        prefix = _PACKED[stem].format(n=number)
        parts = split_packed(tensor, config, vision=stem.startswith("vision_model"))
        return {f"{prefix}{name}{leaf}": part.contiguous() for name, part in parts.items()}
    if stem not in _RENAMES:
        raise KeyError(f"{key!r} is not a name of the released ARGenSeg layout")
    return {_RENAMES[stem].format(n=number) + leaf: tensor}


def convert_state_dict(released: Mapping[str, torch.Tensor], config: ARGenSegConfig) -> dict[str, torch.Tensor]:
    """A released state dict as that of `ARGenSegForConditionalGeneration`."""
    native: dict[str, torch.Tensor] = {}
    for key, tensor in released.items():
        native.update(convert_tensor(key, tensor, config))
    return native


def revert_state_dict(
    native: Mapping[str, torch.Tensor], visual_tokenizer: Mapping[str, torch.Tensor], config: ARGenSegConfig
) -> dict[str, torch.Tensor]:
    """Our two state dicts as one in the released layout, bit for bit."""
    back = {ours: theirs for theirs, ours in _RENAMES.items()}
    packed_back = {ours: theirs for theirs, ours in _PACKED.items()}
    released = {TOKENIZER_PREFIX + key: tensor for key, tensor in visual_tokenizer.items()}
    packed: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in native.items():
        if key == _POSITIONS[1]:
            released[_POSITIONS[0]] = tensor[None]
            continue
        if key.startswith("model.quantizer."):
            continue
        stem, number, leaf = _template(key)
        prefix, _, name = stem.rpartition(".")
        if prefix + "." in packed_back and name in ("q_proj", "k_proj", "v_proj"):
            packed.setdefault(packed_back[prefix + "."].format(n=number) + leaf, {})[name] = tensor
        else:
            released[back[stem].format(n=number) + leaf] = tensor
    for key, parts in packed.items():
        released[key] = join_packed(parts, config, vision=key.startswith("vision_model"))
    return released


def _text_config(llm: Mapping[str, Any]) -> LlamaConfig:
    rope: dict[str, Any] = {"rope_theta": float(llm["rope_theta"]), "rope_type": "default"}
    if llm.get("rope_scaling"):
        rope.update(rope_type=llm["rope_scaling"]["type"], factor=llm["rope_scaling"]["factor"])
    return LlamaConfig(
        **{name: llm[name] for name in _TEXT_FIELDS},
        attention_bias=llm["bias"],
        rope_parameters=rope,
        bos_token_id=llm["bos_token_id"],
        eos_token_id=llm["eos_token_id"],
        pad_token_id=llm["pad_token_id"],
        tie_word_embeddings=False,
    )


def _vision_config(vision: Mapping[str, Any]) -> InternVLVisionConfig:
    return InternVLVisionConfig(
        **{name: vision[name] for name in _VISION_FIELDS},
        attention_bias=vision["qkv_bias"],
        use_qk_norm=vision["qk_normalization"],
    )


def convert_config(
    released: Mapping[str, Any],
    image_token_id: int = 92546,
    visual_tokenizer_config: VARTokenizerConfig | None = None,
) -> ARGenSegConfig:
    """`config.json` of a released checkpoint (`InternVLChatConfig`) as ours.

    The codebook is the tail of the vocabulary; `<ge_start>`, `<ge_end>` and `<MASK_CONTEXT>` stand before it.

    Args:
        released: the parsed `config.json`.
        image_token_id: id of `<IMG_CONTEXT>`; the default is that of the 8B checkpoint.
        visual_tokenizer_config: sizes of the VQ-VAE; default: VAR's at 256 px.
    """
    pictures = visual_tokenizer_config or VARTokenizerConfig()
    vision, text = _vision_config(released["vision_config"]), _text_config(released["llm_config"])
    grid = released.get("force_image_size", vision.image_size[0]) // vision.patch_size[0]
    first_visual = text.vocab_size - pictures.vocab_size
    vlm = InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=image_token_id,
        image_seq_length=int(grid * released["downsample_ratio"]) ** 2,
        downsample_ratio=released["downsample_ratio"],
        vision_feature_layer=released["select_layer"],
        tie_word_embeddings=False,
    )
    return ARGenSegConfig(
        vlm_config=vlm,
        visual_tokenizer_config=pictures,
        gen_start_token_id=first_visual - 3,
        gen_end_token_id=first_visual - 2,
        visual_token_offset=first_visual,
    )


def revert_config(config: ARGenSegConfig) -> dict[str, Any]:
    """Our configuration as the `config.json` of a released checkpoint: what `convert_config` reads, and the rest of it.

    Raises:
        ValueError: another text model, or options, that the released layout has no place for.
    """
    vlm, text, vision = config.vlm_config, config.text_config, config.vlm_config.vision_config
    tail = text.vocab_size - config.visual_tokenizer_config.vocab_size
    ids = (config.gen_start_token_id, config.gen_end_token_id, config.visual_token_offset)
    fits = vlm.model_type == "internvl" and text.model_type == "llama" and ids == (tail - 3, tail - 2, tail)
    if not fits or config.scale_attention != "causal" or config.generation_projector_depth != 1 or config.num_scales:
        raise ValueError(
            "the released layout holds InternVL with a Llama text model, causal scale attention, a linear projector, "
            "all scales, and the codebook as the tail of the vocabulary; this model is another"
        )
    rope = text.rope_parameters
    scaling = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], "factor": rope["factor"]}
    llm = {name: getattr(text, name) for name in (*_TEXT_FIELDS, "bos_token_id", "eos_token_id", "pad_token_id")}
    llm |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": text.attention_bias}
    llm |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "tie_word_embeddings": False}
    tower = {name: getattr(vision, name) for name in _VISION_FIELDS}
    tower |= {"image_size": vision.image_size[0], "patch_size": vision.patch_size[0], "model_type": "intern_vit_6b"}
    tower |= {"qkv_bias": vision.attention_bias, "qk_normalization": vision.use_qk_norm}
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLGenSeg"],
        "llm_config": llm,
        "vision_config": tower,
        "hidden_size": text.hidden_size,
        "force_image_size": vision.image_size[0],
        "downsample_ratio": vlm.downsample_ratio,
        "select_layer": vlm.vision_feature_layer,
        "template": "internvl2_5",
        **_ONE_SQUASHED_TILE,
        "tie_word_embeddings": False,
        "torch_dtype": str(config.dtype or "float32").removeprefix("torch."),
    }


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the program; see `convert_checkpoint`, which imports the model."""
    from .convert_checkpoint import make_parser as make

    return make()


if __name__ == "__main__":
    from .convert_checkpoint import main

    main()
