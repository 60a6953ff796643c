"""Encoder and decoder of VAR's VQ-VAE (those of latent diffusion's f16 family).

Shapes: B batch, D latent channels, h = w the side of the latent, H = W the side of the picture.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_argenseg import VARTokenizerConfig


def group_norm(config: VARTokenizerConfig, channels: int) -> nn.Module:
    if config.norm_num_groups == 0:
        return nn.Identity()
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)


def silu_of(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`silu(norm(x))`, without another copy of a full-size picture where no gradient needs one."""
    h = norm(x)
    return F.silu(h, inplace=h is not x and not torch.is_grad_enabled())


class LastConv2d(nn.Conv2d):
    """Last convolution of a block without normalisation: starts at zero, so that the block starts as the identity."""


class ResnetBlock(nn.Module):
    def __init__(self, config: VARTokenizerConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(config, out_channels)
        last = nn.Conv2d if config.norm_num_groups else LastConv2d
        self.conv2 = last(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(silu_of(self.norm1, x))
        return self.conv2(silu_of(self.norm2, h)).add_(self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all cells."""

    def __init__(self, config: VARTokenizerConfig, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(config, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv_BLC = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)
        h_BLC = F.scaled_dot_product_attention(*qkv_BLC.chunk(3, dim=-1))
        return x + self.proj_out(h_BLC.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution; `attn` is empty but at the lowest."""

    def __init__(self, config: VARTokenizerConfig, channels: list[int], attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(config, a, b) for a, b in zip(channels[:-1], channels[1:], strict=True))
        self.attn = nn.ModuleList(AttentionBlock(config, c) for c in channels[1:] if attention)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        return h


class Middle(nn.Module):
    def __init__(self, config: VARTokenizerConfig, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(config, channels, channels)
        self.attn_1 = AttentionBlock(config, channels) if config.use_attention else nn.Identity()
        self.block_2 = ResnetBlock(config, channels, channels)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Picture (B, 3, H, W) to latent (B, D, h, w)."""

    def __init__(self, config: VARTokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.num_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.base_channels
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            level = Level(config, [channels] + [width] * config.num_res_blocks, config.use_attention and last)
            if not last:
                level.downsample = Downsample(width)
            self.down.append(level)
            channels = width
        self.mid = Middle(config, channels)
        self.norm_out = group_norm(config, channels)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for level in self.down[:-1]:
            h = level.downsample(level(h))
        h = self.mid(self.down[-1](h))
        return self.conv_out(silu_of(self.norm_out, h))


class Decoder(nn.Module):
    """Latent (B, D, h, w) to picture (B, 3, H, W)."""

    def __init__(self, config: VARTokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(config, widths[-1])
        levels: list[Level] = []
        channels = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            last = i == len(widths) - 1
            level = Level(config, [channels] + [width] * (config.num_res_blocks + 1), config.use_attention and last)
            if i:
                level.upsample = Upsample(width)
            levels.insert(0, level)  # up.0 is the finest, as in VAR
            channels = width
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(config, channels)
        self.conv_out = nn.Conv2d(channels, config.num_channels, 3, padding=1)

    def forward(self, f_BDhw: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(f_BDhw))
        for level in reversed(self.up[1:]):
            h = level.upsample(level(h))
        return self.conv_out(silu_of(self.norm_out, self.up[0](h)))


__all__ = ["Decoder", "Encoder", "LastConv2d"]
