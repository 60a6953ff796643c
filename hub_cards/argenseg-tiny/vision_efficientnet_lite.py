"""A small hybrid vision tower: a frozen convolutional trunk below a few transformer layers.

The trunk is EfficientNet-Lite0 (Tan & Le, "EfficientNet", ICML 2019, without squeeze-and-excitation and with ReLU6);
its features become the tokens of a vision transformer (the "hybrid architecture" of Dosovitskiy et al., "An Image is
Worth 16x16 Words", ICLR 2021, section 3.1). The transformer layers are those of transformers' InternVL, so that the
tower can stand in for `InternVLVisionModel` inside `InternVLModel` with `vision_feature_select_strategy="full"`
(there is no CLS token).

Shape suffixes: B batch, C channels, H/W height/width of a feature map, N tokens, D hidden size.
"""

from contextlib import nullcontext
from math import prod
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.internvl.configuration_internvl import InternVLConfig, InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import (
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLVisionAttention,
    InternVLVisionLayer,
    InternVLVisionPreTrainedModel,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


@strict
class EfficientNetLiteVisionConfig(InternVLVisionConfig):
    """Configuration of [`EfficientNetLiteVisionModel`]; the defaults give the EfficientNet-Lite0 trunk at 256 x 256.

    The fields of `InternVLVisionConfig` keep their meaning for the transformer layers; `use_mask_token` is ignored.

    Args:
        stem_channels: output channels of the first convolution (3 x 3, stride 2).
        stages: one `(kernel, stride, expansion, channels, repeats)` per stage of inverted residual blocks; the stride
            applies to the first block of the stage.
        patch_size: pixels between neighbouring tokens.
        image_size: pixels; must be divisible by `patch_size` and by the trunk's stride (32).
        feature_strides: strides of the trunk whose features make the tokens. Those coarser than `patch_size` are
            up-sampled, those finer folded (all cells below a token side by side), so that a token knows where in
            its patch an edge lies; where these are not a power of two in a row, they are resampled to the next lower
            one. So images of 384 pixels with patches of 24 need the same weights as 256 pixels with patches of 16.
            Default: the trunk's stride and half of it.
        freeze_trunk: run the trunk without gradients, in evaluation mode, and mark its parameters as not trainable.
        use_mean_pooling: return the mean token as `pooler_output` (otherwise `None`).
    """

    model_type = "efficientnet_lite_vision"
    base_config_key = "vision_config"

    image_size: int | list[int] | tuple[int, ...] = (256, 256)
    patch_size: int | list[int] | tuple[int, ...] = (16, 16)
    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    attention_bias: bool = True
    layer_scale_init_value: float = 1.0
    stem_channels: int = 32
    stages: list[list[int]] | tuple[tuple[int, ...], ...] = (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )
    feature_strides: list[int] | tuple[int, ...] | None = None
    freeze_trunk: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.stages = [list(stage) for stage in self.stages]
        if any(len(stage) != 5 or stage[1] not in (1, 2) for stage in self.stages):
            raise ValueError("each stage must be (kernel, stride 1 or 2, expansion, channels, repeats)")
        total_stride = 2 * prod(stage[1] for stage in self.stages)
        if self.feature_strides is None:
            self.feature_strides = [total_stride // 2, total_stride]
        self.feature_strides = list(self.feature_strides)
        strides = [2**power for power in range(1, total_stride.bit_length())]
        if not self.feature_strides or not set(self.feature_strides) <= set(strides):
            raise ValueError(f"feature_strides must be some of the trunk's {strides}, got {self.feature_strides}")
        if any(size % total_stride for size in self.image_size):
            raise ValueError(f"image_size must be divisible by {total_stride}, got {self.image_size}")
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"image_size {self.image_size} must be divisible by patch_size {self.patch_size}")

    @property
    def folds(self) -> list[int]:
        """Of each of `feature_strides`: how many cells in a row lie below a token."""
        patch = min(self.patch_size)
        return [2 ** max((patch // stride).bit_length() - 1, 0) for stride in self.feature_strides]


class EfficientNetLiteConv2d(nn.Conv2d):
    """Convolution with bias (a batch norm is folded into it), TensorFlow's SAME padding, and optionally ReLU6.

    SAME padding adds `kernel - stride` pixels in all when the input is divisible by the stride, the odd one at the
    bottom and right; so it is asymmetric exactly where the stride is 2.

    Shapes: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1, act=True):
        total = max(kernel - stride, 0)
        super().__init__(channels_in, channels_out, kernel, stride, padding=0, groups=groups, bias=True)
        self.act = act
        self.same_padding: tuple[int, ...] | None = (total // 2, total - total // 2) * 2
        if stride == 1:  # symmetric: the convolution pads by itself
            self.padding, self.same_padding = (total // 2, total // 2), None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.same_padding is not None:
            hidden_states = F.pad(hidden_states, self.same_padding)
        hidden_states = super().forward(hidden_states)  # (B, C_out, H', W')
        return F.relu6(hidden_states, inplace=True) if self.act else hidden_states


class EfficientNetLiteBlock(nn.Module):
    """Inverted residual block: 1 x 1 expansion, depthwise convolution, linear 1 x 1 projection, skip if shapes agree.

    Shapes: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = channels_in * expansion
        self.skip = stride == 1 and channels_in == channels_out
        self.expand = EfficientNetLiteConv2d(channels_in, width, 1) if expansion != 1 else None
        self.depthwise = EfficientNetLiteConv2d(width, width, kernel, stride, groups=width)
        self.project = EfficientNetLiteConv2d(width, channels_out, 1, act=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = hidden_states if self.expand is None else self.expand(hidden_states)
        inner = self.project(self.depthwise(inner))
        return hidden_states + inner if self.skip else inner


class EfficientNetLiteTrunk(nn.Module):
    """The convolutions up to, and without, the classifier's head. Returns the last features of each stride asked for.

    Shapes: (B, 3, H, W) -> (B, C_s, H / s, W / s) for every s of `config.feature_strides`, in their order;
    `out_channels` has the C_s.
    """

    def __init__(self, config: EfficientNetLiteVisionConfig):
        super().__init__()
        channels = config.stem_channels
        self.stem = EfficientNetLiteConv2d(config.num_channels, channels, 3, stride=2)
        blocks, at_stride, stride = [], {2: (0, channels)}, 2  # stride -> (blocks before its last features, channels)
        for kernel, stage_stride, expansion, width, repeats in config.stages:
            for index in range(repeats):
                block_stride = stage_stride if index == 0 else 1
                blocks.append(EfficientNetLiteBlock(channels, width, kernel, block_stride, expansion))
                stride, channels = stride * block_stride, width
                at_stride[stride] = (len(blocks), channels)
        self.blocks = nn.ModuleList(blocks)
        self.depths = [at_stride[one][0] for one in config.feature_strides]
        self.out_channels = tuple(at_stride[one][1] for one in config.feature_strides)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden_states = self.stem(pixel_values)
        found = {0: hidden_states}
        for depth, block in enumerate(self.blocks[: max(self.depths)], start=1):
            hidden_states = block(hidden_states)
            if depth in self.depths:
                found[depth] = hidden_states
        return tuple(found[depth] for depth in self.depths)


class EfficientNetLiteVisionPreTrainedModel(InternVLVisionPreTrainedModel):
    """Weight initialisation and feature flags; the latter are inherited from InternVL's vision tower."""

    config: EfficientNetLiteVisionConfig
    base_model_prefix = "efficientnet_lite_vision"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["InternVLVisionLayer", "EfficientNetLiteBlock"]
    _can_record_outputs: ClassVar = {"hidden_states": InternVLVisionLayer, "attentions": InternVLVisionAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, EfficientNetLiteConv2d):  # there is no batch norm to rescale small weights
            init.kaiming_normal_(module.weight, nonlinearity="relu" if module.act else "linear")
            init.zeros_(module.bias)
        elif isinstance(module, EfficientNetLiteVisionModel) and module.position_embeddings is not None:
            init.normal_(module.position_embeddings, std=self.config.initializer_range)


class EfficientNetLiteVisionModel(EfficientNetLiteVisionPreTrainedModel):
    """Trunk, layer norm and linear projection of its features, position embeddings, transformer layers, layer norm.

    With `config.freeze_trunk` the trunk always runs under `torch.no_grad` and stays in evaluation mode, and its
    parameters are marked as not trainable at construction and on every `train()` / `eval()` (so after
    `from_pretrained` too). The trunk has no layer whose behaviour depends on the mode.
    """

    def __init__(self, config: EfficientNetLiteVisionConfig):
        super().__init__(config)
        self.grid_size = tuple(size // patch for size, patch in zip(config.image_size, config.patch_size, strict=True))
        self.trunk = EfficientNetLiteTrunk(config)
        self.folds = config.folds
        width = sum(count * fold**2 for count, fold in zip(self.trunk.out_channels, self.folds, strict=True))
        # the pretrained features are large (standard deviation 3 to 7): unscaled they would drown the positions
        self.feature_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(width, config.hidden_size)
        self.position_embeddings = None
        if config.use_absolute_position_embeddings:
            self.position_embeddings = nn.Parameter(torch.zeros(1, prod(self.grid_size), config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([InternVLVisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()
        self.train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.projection

    def set_input_embeddings(self, value: nn.Module):
        self.projection = value

    def train(self, mode: bool = True) -> "EfficientNetLiteVisionModel":
        super().train(mode)
        if self.config.freeze_trunk:
            self.trunk.eval().requires_grad_(False)
        return self

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Tokens before the transformer. Shapes: (B, 3, H, W) -> (B, N, D), N row by row."""
        if tuple(pixel_values.shape[-2:]) != tuple(self.config.image_size):
            raise ValueError(f"expected images of {self.config.image_size}, got {tuple(pixel_values.shape[-2:])}")
        pixel_values = pixel_values.to(self.trunk.stem.weight.dtype)
        with torch.no_grad() if self.config.freeze_trunk else nullcontext():
            found = self.trunk(pixel_values.contiguous(memory_format=torch.channels_last))
            grids = [self.to_grid(one, fold) for one, fold in zip(found, self.folds, strict=True)]
            features_BCHW = torch.cat(grids, dim=1)
        features_BNC = features_BCHW.permute(0, 2, 3, 1).flatten(1, 2)
        embeddings_BND = self.projection(self.feature_norm(features_BNC))
        if self.position_embeddings is not None:
            embeddings_BND = embeddings_BND + self.position_embeddings
        return self.dropout(embeddings_BND)

    def to_grid(self, features: torch.Tensor, fold: int) -> torch.Tensor:
        """Features (B, C, h, w) of any stride on the tokens' grid: (B, fold * fold * C, rows, columns)."""
        size = tuple(fold * side for side in self.grid_size)
        if tuple(features.shape[-2:]) != size:
            resized = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
            features = resized.to(features.dtype)
        return F.pixel_unshuffle(features, fold) if fold > 1 else features

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (B, 3, H, W), normalised with the mean and standard deviation of ImageNet.

        Returns:
            `last_hidden_state` (B, N, D) with N = H / P * W / P tokens row by row, P the
            `patch_size`, and `pooler_output` (B, D).
        """
        hidden_states_BND = self.embed(pixel_values)
        for layer in self.layers:
            hidden_states_BND = layer(hidden_states_BND)
        hidden_states_BND = self.layernorm(hidden_states_BND)
        pooled_BD = hidden_states_BND.mean(1) if self.config.use_mean_pooling else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states_BND, pooler_output=pooled_BD)


@strict
class HybridInternVLConfig(InternVLConfig):
    """`InternVLConfig` above this tower. The stock class reads any saved `vision_config` as `InternVLVisionConfig`, so
    that a saved model could not be loaded; otherwise nothing differs, but for the default of the selection strategy.
    """

    model_type = "internvl_hybrid"
    sub_configs_defaults: ClassVar = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "vision_config": EfficientNetLiteVisionConfig,
    }

    vision_feature_select_strategy: str = "full"


class HybridInternVLModel(InternVLModel):
    """`InternVLModel` with an [`EfficientNetLiteVisionModel`] as vision tower."""

    config: HybridInternVLConfig


class HybridInternVLForConditionalGeneration(InternVLForConditionalGeneration):
    """`InternVLForConditionalGeneration` with an [`EfficientNetLiteVisionModel`] as vision tower."""

    config: HybridInternVLConfig


# here, not in the package's __init__, because this file is also loaded by itself, as remote code
AutoConfig.register(EfficientNetLiteVisionConfig.model_type, EfficientNetLiteVisionConfig, exist_ok=True)
AutoConfig.register(HybridInternVLConfig.model_type, HybridInternVLConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteVisionConfig, EfficientNetLiteVisionModel, exist_ok=True)
AutoModel.register(HybridInternVLConfig, HybridInternVLModel, exist_ok=True)
AutoModelForImageTextToText.register(HybridInternVLConfig, HybridInternVLForConditionalGeneration, exist_ok=True)

__all__ = [
    "EfficientNetLiteVisionConfig",
    "EfficientNetLiteVisionModel",
    "EfficientNetLiteVisionPreTrainedModel",
    "HybridInternVLConfig",
    "HybridInternVLForConditionalGeneration",
    "HybridInternVLModel",
]
