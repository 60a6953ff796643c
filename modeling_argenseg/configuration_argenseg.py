"""Configurations: the picture vocabulary (`VARTokenizerConfig`) and the model around it (`ARGenSegConfig`)."""

import copy
import os
import shutil
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

# a `vlm_config` may be one, and the import registers it
from .vision_efficientnet_lite import HybridInternVLConfig  # noqa: F401

if TYPE_CHECKING:  # what is imported by name, here too, is what is saved beside a configuration
    from .modeling_argenseg import ARGenSegForConditionalGeneration  # noqa: F401

FROM_REMOTE_CODE = __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)


class RemoteCodeMixin:
    """Saves the code with the configuration: what is saved loads with `trust_remote_code=True` where this package is
    not installed. Where it is, the package's own code is used and the entries that name the saved code are ignored
    (transformers would ask for the flag because of `custom_pipelines`).
    """

    remote_code: ClassVar[dict[str, dict]] = {}

    def __post_init__(self, **kwargs: Any) -> None:
        if not FROM_REMOTE_CODE:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("auto_map", "custom_pipelines")}
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As usual; the code goes into the same folder."""
        published = copy.copy(self)
        # no `_auto_class`: transformers would take any class with "Tokenizer" in its name for a text tokenizer
        published.__dict__.update(copy.deepcopy(self.remote_code), _auto_class=None)
        super(RemoteCodeMixin, published).save_pretrained(save_directory, **({} if push_to_hub else kwargs))  # type: ignore[misc]
        for file in {__file__, *get_relative_import_files(__file__)}:
            shutil.copyfile(file, Path(save_directory, Path(file).name))
        if push_to_hub:  # all of it
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)  # type: ignore[attr-defined]


class VARTokenizerConfig(RemoteCodeMixin, PreTrainedConfig):
    """Sizes of a VAR multi-scale VQ-VAE. The defaults are those of VAR's `vae_ch160v4096z32` at 256 px.

    Args:
        image_size: side of the square picture, in pixels.
        num_channels: colour channels of the picture.
        base_channels: channels at full resolution; `channel_multipliers` scales them level by level, and every level
            but the last halves the resolution.
        num_res_blocks: residual blocks a level (the decoder has one more).
        norm_num_groups: groups of every group normalisation; 0 leaves the normalisation out, so that what is drawn
            in one corner cannot change the tokens of another (used by the small default tokenizer).
        use_attention: self-attention at the lowest resolution and in the middle, as released.
        latent_channels: channels D of the latent and length of a codebook entry.
        vocab_size: number V of codebook entries.
        patch_nums: sides p_1..p_K of the scales, coarse to fine; the last is the side of the latent. A side may come
            twice: the second pass codes what the first left over.
        num_phi: how many `phi` convolutions the scales share.
        phi_ratio: share of the convolution in `phi(x) = (1 - r) x + r conv(x)`.
        rate_weight: entropy-constrained quantisation (Chou, Lookabaugh & Gray 1989): a code is chosen by squared
            distance + `rate_weight` * (-log of its frequency at that scale), which makes the tokens predictable.
            One number, or one for each scale. 0 is nearest neighbour, as released.
        search_steps: steps in which `VARTokenizer.encode` tries out tokens of the last scale for the mask that they
            give; 0 takes the nearest codes, as released.
    """

    model_type = "var_tokenizer"
    remote_code: ClassVar[dict[str, dict]] = {
        "auto_map": {
            "AutoConfig": "configuration_argenseg.VARTokenizerConfig",
            "AutoModel": "var_tokenizer.VARTokenizer",
        }
    }

    image_size: int = 256
    num_channels: int = 3
    base_channels: int = 160
    channel_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_num_groups: int = 32
    use_attention: bool = True
    latent_channels: int = 32
    vocab_size: int = 4096
    patch_nums: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    num_phi: int = 4
    phi_ratio: float = 0.5
    rate_weight: float | list[float] = 0.0
    search_steps: int = 0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.patch_nums = [int(side) for side in self.patch_nums]
        self.channel_multipliers = [int(m) for m in self.channel_multipliers]
        super().__post_init__(**kwargs)
        latent_side, remainder = divmod(self.image_size, 2 ** (len(self.channel_multipliers) - 1))
        if remainder or latent_side != self.patch_nums[-1]:
            raise ValueError(
                f"the last scale must be as fine as the latent: image_size {self.image_size} over "
                f"{len(self.channel_multipliers)} levels gives a side of {latent_side}, patch_nums ends in "
                f"{self.patch_nums[-1]}"
            )
        if isinstance(self.rate_weight, list | tuple) and len(self.rate_weight) != len(self.patch_nums):
            raise ValueError(f"rate_weight has {len(self.rate_weight)} numbers for {len(self.patch_nums)} scales")
        if any(a > b for a, b in zip(self.patch_nums, self.patch_nums[1:], strict=False)):
            raise ValueError(f"patch_nums must go from coarse to fine, got {self.patch_nums}")

    @property
    def num_tokens(self) -> int:
        """T, the visual tokens of one picture."""
        return sum(self.scale_sizes)

    @property
    def scale_sizes(self) -> list[int]:
        """Visual tokens of each scale."""
        return [side * side for side in self.patch_nums]

    @property
    def scale_starts(self) -> list[int]:
        """Index of the first token of each scale."""
        return list(accumulate(self.scale_sizes[:-1], initial=0))


class ARGenSegConfig(RemoteCodeMixin, PreTrainedConfig):
    """A vision-language model whose vocabulary also holds the codebook of a VAR tokenizer.

    Args:
        vlm_config: configuration of an image-text-to-text model of transformers (InternVL, LLaVA and the like: the
            images alone give the features, and every layer of the language model attends to the whole stream).
        visual_tokenizer_config: sizes of the pictures (the VAR tokenizer's own configuration).
        gen_start_token_id: id of `<gen_start>`; T visual ids follow it in the stream.
        gen_end_token_id: id of `<gen_end>`, read by the model at the position of the last visual token.
        visual_token_offset: id of codebook entry 0; entry j is `visual_token_offset + j`.
        scale_attention: `"causal"` (as released: plain causal attention, also inside a scale) or `"block"`
            (the queries of one scale see each other, as in VAR).
        generation_projector_depth: 1 for a linear projector (as released), 2 for Linear-GELU-Linear.
        visual_loss: `"token"` averages the visual loss over tokens (as released), `"scale"` averages over the tokens
            of each scale first, then over the scales, so that the few coarse tokens that decide where the object is
            weigh as much as the many fine ones.
        visual_loss_weight: factor on the visual part of the loss.
        num_scales: pictures in the stream hold only the first `num_scales` scales (a coarse preview, and the first
            stage of a coarse-to-fine training); None for all K.
        image_grid: rows and columns of the tokens of an image, for vision-language models of the Qwen-VL family, whose
            image tokens have positions of two dimensions; None for others.
    """

    model_type = "argenseg"
    keys_to_ignore_at_inference: ClassVar = [
        "past_key_values",
        "cache",
        "image_hidden_states",
        "text_loss",
        "visual_loss",
    ]
    remote_code: ClassVar[dict[str, dict]] = {
        "auto_map": {
            "AutoConfig": "configuration_argenseg.ARGenSegConfig",
            "AutoModel": "modeling_argenseg.ARGenSegModel",
            "AutoModelForImageTextToText": "modeling_argenseg.ARGenSegForConditionalGeneration",
            "AutoModelForImageSegmentation": "modeling_argenseg.ARGenSegForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_argenseg.ARGenSegForConditionalGeneration",
            "AutoProcessor": "processing_argenseg.ARGenSegProcessor",
        },
        "custom_pipelines": {
            "image-segmentation": {
                "impl": "pipeline_argenseg.ARGenSegPipeline",
                "pt": ["AutoModelForImageTextToText"],
                "type": "multimodal",
            }
        },
    }
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vlm_config": SubConfigSpec(config_class=AutoConfig, model_type="internvl"),
        "visual_tokenizer_config": VARTokenizerConfig,
    }

    vlm_config: dict | PreTrainedConfig | None = None
    visual_tokenizer_config: dict | PreTrainedConfig | None = None
    gen_start_token_id: int | None = None
    gen_end_token_id: int | None = None
    visual_token_offset: int | None = None
    scale_attention: str = "causal"
    generation_projector_depth: int = 1
    visual_loss: str = "token"
    visual_loss_weight: float = 1.0
    num_scales: int | None = None
    image_grid: list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Also asked by the model: options given to `from_pretrained` are set after `__post_init__`.

        Raises:
            ValueError: a field has a value that it cannot have.
        """
        if self.scale_attention not in ("causal", "block"):
            raise ValueError(f"scale_attention must be 'causal' or 'block', got {self.scale_attention!r}")
        if self.generation_projector_depth not in (1, 2):
            raise ValueError(f"generation_projector_depth must be 1 or 2, got {self.generation_projector_depth}")
        if self.visual_loss not in ("token", "scale"):
            raise ValueError(f"visual_loss must be 'token' or 'scale', got {self.visual_loss!r}")
        if self.image_grid is not None and not (len(self.image_grid) == 2 and min(self.image_grid) > 0):
            raise ValueError(f"image_grid must be [rows, columns], or None; got {self.image_grid!r}")
        scales = len(self.visual_tokenizer_config.patch_nums)
        if self.num_scales is not None and self.num_scales not in range(1, scales + 1):
            raise ValueError(f"num_scales must be from 1 to {scales}, or None for all; got {self.num_scales!r}")

    def check_ids(self) -> None:
        """Asked by the model alone: a configuration may be made before its ids are known.

        Raises:
            ValueError: an id of the picture vocabulary is missing, or does not fit the others and the vocabulary.
        """
        size, codes = self.text_config.vocab_size, self.visual_vocab_size
        ids: dict[str, Any] = {
            name: getattr(self, name) for name in ("gen_start_token_id", "gen_end_token_id", "visual_token_offset")
        }
        for name, value in ids.items():
            if value is None:
                raise ValueError(f"{name} is not set: a model needs the ids {', '.join(ids)}")
        offset = ids.pop("visual_token_offset")
        if not 0 <= offset <= size - codes:
            raise ValueError(f"visual_token_offset {offset} and {codes} codes do not fit a vocabulary of {size}")
        for name, value in ids.items():
            if not 0 <= value < size:
                raise ValueError(f"{name} {value} is no id of a vocabulary of {size}")
            if 0 <= value - offset < codes:
                raise ValueError(f"{name} {value} is an id of the codebook, which begins at {offset}")
        if len(set(ids.values())) == 1:
            raise ValueError(f"gen_start_token_id and gen_end_token_id are both {self.gen_start_token_id}")

    @property
    def text_config(self) -> PreTrainedConfig:
        """Configuration of the language model inside `vlm_config`."""
        return self.vlm_config.get_text_config(decoder=True)

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder that image features replace."""
        return self.vlm_config.image_token_id

    @property
    def visual_vocab_size(self) -> int:
        return self.visual_tokenizer_config.vocab_size

    @property
    def patch_nums(self) -> list[int]:
        """Sides of the scales that a picture in the stream has."""
        return self.visual_tokenizer_config.patch_nums[: self.num_scales]

    @property
    def picture_length(self) -> int:
        """T, the visual ids that follow `<gen_start>`."""
        return sum(self.scale_sizes)

    @property
    def scale_sizes(self) -> list[int]:
        """Visual ids of each scale that a picture in the stream has."""
        return self.visual_tokenizer_config.scale_sizes[: self.num_scales]

    @property
    def scale_starts(self) -> list[int]:
        """Index, in its picture, of the first visual id of each of these scales."""
        return self.visual_tokenizer_config.scale_starts[: self.num_scales]

    @property
    def visual_slice(self) -> slice:
        """The visual ids among all ids of the vocabulary: rows of the head, columns of logits."""
        return slice(self.visual_token_offset, self.visual_token_offset + self.visual_vocab_size)  # type: ignore[operator]

    def is_visual(self, ids: Any) -> Any:
        """Where a tensor of token ids holds visual ids: a bool tensor of its shape."""
        codes = ids - self.visual_token_offset
        return (codes >= 0) & (codes < self.visual_vocab_size)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        return self.text_config


__all__ = ["ARGenSegConfig", "VARTokenizerConfig"]
