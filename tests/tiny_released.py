"""Checkpoints of toy size in the released layout, with random weights and a byte-level `tokenizer.json`."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_argenseg import VARTokenizerConfig
from modeling_argenseg.conversion_argenseg import convert_config
from modeling_argenseg.released_checkpoint import PATCH_NUMS, PREFIX, released_shapes
from modeling_argenseg.tensor_files import INDEX, WEIGHTS, PlannedTensor, write_safetensors

CODES = 64
SPECIAL = (
    "<unk> <s> </s> <|im_end|> <|im_start|> <img> </img> <IMG_CONTEXT> <mask> <ge_start> <ge_end> <MASK_CONTEXT>"
).split()
VOCAB = 256 + len(SPECIAL) + CODES
FIRST_VISUAL = VOCAB - CODES


def config_json(vocab_size: int = VOCAB, **llm: Any) -> dict:
    text = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, hidden_act="silu", max_position_embeddings=32768, rms_norm_eps=1e-5,
        initializer_range=0.02, bias=False, rope_theta=1000000, rope_scaling={"type": "dynamic", "factor": 2.0},
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_channels=3,
        image_size=28, patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6, norm_type="layer_norm",
        attention_dropout=0.0, initializer_range=0.02, qkv_bias=True, qk_normalization=False,
    )  # fmt: skip
    return dict(
        model_type="internvl_chat", architectures=["InternVLGenSeg"], template="internvl2_5", torch_dtype="float32",
        force_image_size=28, downsample_ratio=0.5, select_layer=-1, pad2square=False, llm_config=text | llm,
        vision_config=vision,
    )  # fmt: skip


def visual_tokenizer_config(picture_length: int = 680) -> VARTokenizerConfig:
    sides = PATCH_NUMS[picture_length]
    return VARTokenizerConfig(
        image_size=16 * sides[-1], base_channels=32, channel_multipliers=(1,) * 5, num_res_blocks=1, vocab_size=CODES,
        patch_nums=sides,
    )  # fmt: skip


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: (torch.rand(shape, generator=generator) - 0.5).to(dtype) for key, shape in shapes.items()}


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int = 1) -> None:
    """`model.safetensors`, or shards of about equal size with their index."""
    total, seen = sum(tensor.nbytes for tensor in tensors.values()), 0
    parts: list[list[str]] = [[] for _ in range(num_shards)]
    for key, tensor in tensors.items():
        parts[seen * num_shards // total].append(key)
        seen += tensor.nbytes
    weight_map = {}
    for number, part in enumerate(parts):
        name = WEIGHTS if num_shards == 1 else f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        plan = {k: PlannedTensor(tensors[k].dtype, tuple(tensors[k].shape), lambda k=k: tensors[k]) for k in part}
        weight_map |= {key: name for key, *_ in write_safetensors(folder / name, plan)}
    if num_shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tokenizer(folder: Path, special: list[str] | tuple[str, ...] = tuple(SPECIAL)) -> None:
    """One token per byte, then the special and the visual tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = [*special, *(f"<visual token {code:06d}>" for code in range(CODES))]
    backend.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokens = dict(bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)


def released_tensors(config: dict, picture_length: int = 680, **options: Any) -> dict[str, torch.Tensor]:
    return random_tensors(
        released_shapes(convert_config(config, 0, visual_tokenizer_config(picture_length))), **options
    )


def write_checkpoint(
    folder: Path, num_shards: int = 1, picture_length: int = 680, vae_in_pth: bool = False, **options: Any
) -> dict[str, torch.Tensor]:
    """A whole released folder; returns its tensors."""
    folder.mkdir(parents=True)
    tensors = released_tensors(config_json(), picture_length, **options)
    (folder / "config.json").write_text(json.dumps(config_json()))
    stored = {key: value for key, value in tensors.items() if not (vae_in_pth and key.startswith(PREFIX))}
    write_weights(folder, stored, num_shards)
    if vae_in_pth:
        vae = {key[len(PREFIX) :]: value for key, value in tensors.items() if key.startswith(PREFIX)}
        torch.save(vae, folder / "vae_ch32v64z32.pth")
    write_tokenizer(folder)
    return tensors
