"""Starting from a plain vision-language model: it gets the picture vocabulary and the parts that draw."""

import copy
import inspect
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

from .configuration_argenseg import ARGenSegConfig
from .image_grid import MODEL_TYPES
from .var_tokenizer import VARTokenizer

NEEDED = "InternVL, LLaVA and Qwen-VL are models of the kind that is needed"
FULL_ATTENTION = "full_attention"
GIVEN = {"self", "pixel_values", "kwargs"}
UNKNOWN_INPUTS = {"image_grid_thw", "pixel_attention_mask", "spatial_shapes"}  # optional by name, but needed


def check_vlm(vlm: nn.Module, image_grid: list[int] | None = None) -> None:
    """
    Raises:
        ValueError: a vision-language model that the stream cannot be built on.
    """
    kind, text_config = type(vlm).__name__, vlm.config.get_text_config(decoder=True)
    if not hasattr(vlm, "language_model") or not hasattr(vlm, "get_image_features"):
        raise ValueError(f"{kind} cannot be built on: it has no `language_model`, or no `get_image_features`")
    has_grid = vlm.config.model_type in MODEL_TYPES
    if has_grid != (image_grid is not None):
        raise ValueError(
            f"{kind} needs image_grid=[rows, columns]: the tokens of an image, at the one size that images have here"
            if has_grid
            else f"image_grid is not for {kind}, but for {', '.join(MODEL_TYPES)}"
        )
    options = inspect.signature(vlm.get_image_features).parameters
    needed = {name for name, option in options.items() if option.default is option.empty} | UNKNOWN_INPUTS & {*options}
    if needed := needed - GIVEN - ({"image_grid_thw"} if has_grid else set()):
        raise ValueError(
            f"{kind} cannot be built on: its image features need {', '.join(sorted(needed))} beside pixel_values. "
            f"{NEEDED}"
        )
    if "token_type_ids" in inspect.signature(vlm.forward).parameters:
        raise ValueError(
            f"{kind} cannot be built on: tokens of an image see those after them there (token_type_ids), and here "
            f"only those before. {NEEDED}"
        )
    window = getattr(text_config, "sliding_window", None)
    layers = getattr(text_config, "layer_types", None) or [FULL_ATTENTION if window is None else "sliding_attention"]
    if other := sorted(set(layers) - {FULL_ATTENTION}):
        raise ValueError(
            f"the language model of {kind} has layers of {', '.join(other)}, and pictures need every layer to attend "
            "to the whole stream. If your streams are shorter than the window, set sliding_window=None in its "
            f"text_config (and all of layer_types, where there are, to {FULL_ATTENTION!r})"
        )


class FromVLMMixin:
    """`from_vlm` of `ARGenSegForConditionalGeneration`."""

    @classmethod
    def from_vlm(
        cls,
        vlm: "str | os.PathLike | PreTrainedModel | Any",
        visual_tokenizer: "str | os.PathLike | VARTokenizer",
        first_new_token_id: int | None = None,
        **config_changes: Any,
    ) -> Any:
        """Start from a plain vision-language model: adds the picture vocabulary and the parts that draw.

        The ids `<gen_start>`, `<gen_end>` and the codebook follow `first_new_token_id` in this order. New rows of
        the embedding and the head start as the mean of the old ones, projector and embeddings of the queries at
        zero (as released). The attention implementation of the whole, and training mode, are those of the model that
        was given; nothing but the quantizer is frozen.

        Args:
            vlm: path or Hub name of an image-text-to-text model, its configuration (random weights), or the model.
            visual_tokenizer: path or Hub name of a VAR tokenizer, or the tokenizer itself.
            first_new_token_id: id of `<gen_start>`; default: the size of the vocabulary as it is.
            config_changes: further fields of `ARGenSegConfig`, such as `scale_attention="block"`.

        Raises:
            ValueError: the vision-language model is of a kind that this cannot be built on.
        """
        base, head, generation_config = _load_vlm(vlm)
        if not isinstance(visual_tokenizer, PreTrainedModel):
            visual_tokenizer = AutoModel.from_pretrained(visual_tokenizer)
        old_size = base.get_input_embeddings().weight.shape[0]
        first = old_size if first_new_token_id is None else first_new_token_id
        new_size = max(old_size, first + 2 + visual_tokenizer.config.vocab_size)
        config = ARGenSegConfig(
            vlm_config=copy.deepcopy(base.config),  # the vocabulary grows below, but not that of the caller's model
            visual_tokenizer_config=copy.deepcopy(visual_tokenizer.config),
            gen_start_token_id=first,
            gen_end_token_id=first + 1,
            visual_token_offset=first + 2,
            tie_word_embeddings=base.config.tie_word_embeddings if head is None else False,
            **config_changes,
        )
        config.text_config.vocab_size = new_size
        config._attn_implementation = base.config._attn_implementation
        # made in the dtype that it has at the end: a cast would round the rotary frequencies, too
        with local_torch_dtype(base.dtype, cls.__name__), no_init_weights():
            model: Any = cls(config)  # type: ignore[call-arg]
        model.model.quantizer.float()
        if generation_config is not None:
            model.generation_config = copy.deepcopy(generation_config)
        model._copy_weights(base, head, visual_tokenizer, first)
        return model.train(base.training)

    @torch.no_grad()
    def _copy_weights(
        self, base: PreTrainedModel, head: torch.Tensor | None, visual_tokenizer: PreTrainedModel, first: int
    ) -> None:
        state = base.state_dict()
        embedding_key = next(
            k
            for k in state
            if state[k] is base.get_input_embeddings().weight
            or state[k].data_ptr() == base.get_input_embeddings().weight.data_ptr()
        )
        state[embedding_key] = _with_mean_rows(state[embedding_key], first, self.lm_head.out_features)
        self.model.vlm.load_state_dict(state)
        if head is not None:
            self.lm_head.weight.copy_(_with_mean_rows(head, first, self.lm_head.out_features))
        self.tie_weights()
        # of a deeper projector the last layer alone: if all were zero, none but its bias would ever get a gradient
        for module in self.model.generation_projector:
            self._init_weights(module)
        for module in (self.model.generation_projector[-1], self.model.scale_embedding, self.model.position_embedding):
            for parameter in module.parameters():
                parameter.zero_()
        self.set_visual_tokenizer(visual_tokenizer)

    def set_visual_tokenizer(self, visual_tokenizer: PreTrainedModel) -> None:
        """Copies the codebook and the phi convolutions of a VAR tokenizer into the frozen quantizer."""
        self.model.quantizer.load_state_dict(visual_tokenizer.quantize.state_dict())


def _load_vlm(vlm: Any) -> tuple[PreTrainedModel, torch.Tensor | None, GenerationConfig | None]:
    """The base model, the weight of its head (None: no head of its own) and how it generates."""
    from transformers import AutoModelForImageTextToText, PreTrainedConfig

    if isinstance(vlm, (str, os.PathLike)):
        vlm = AutoModelForImageTextToText.from_pretrained(vlm)
    elif isinstance(vlm, PreTrainedConfig):
        vlm = AutoModelForImageTextToText.from_config(vlm)
    base = vlm.base_model
    head = vlm.get_output_embeddings()
    tied = head is not None and head.weight is base.get_input_embeddings().weight
    return base, None if head is None or tied else head.weight, vlm.generation_config


def _with_mean_rows(old: torch.Tensor, first: int, size: int) -> torch.Tensor:
    """`old` (V, hidden) grown to `size` rows; those from `first` on, and all new ones, are the mean of those before."""
    new = old.new_empty(size, old.shape[1])
    new[: old.shape[0]] = old[:size]
    new[min(first, old.shape[0]) :] = old[:first].float().mean(0).to(old.dtype)
    return new


__all__ = ["FULL_ATTENTION", "NEEDED", "FromVLMMixin", "check_vlm"]
