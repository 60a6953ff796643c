"""VAR's multi-scale VQ-VAE (Tian et al. 2024) as a transformers model: pictures to visual tokens and back.

`MultiScaleQuantizer` is a class of its own because the language model holds a frozen copy of it: from the visual
tokens in its stream it builds the inputs of the next scale. Parameter names are those of VAR's `vae_ch160v4096z32`.

Shapes: B batch, D latent channels, V codebook entries, K scales of side p_1..p_K, T = sum of p_k squared,
h = w = p_K the side of the latent, H = W the side of the picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_argenseg import VARTokenizerConfig
from .released_checkpoint import LoadsReleased, visual_tokenizer_arguments


class Phi(nn.Conv2d):
    """`phi(x) = (1 - r) x + r conv3x3(x)`: mends what up-sampling a coarse scale blurs."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.ratio = ratio

    def forward(self, h_BDhw: torch.Tensor) -> torch.Tensor:
        return torch.lerp(h_BDhw, super().forward(h_BDhw), self.ratio)


class SharedPhi(nn.Module):
    """`num_phi` convolutions shared among the scales; scale k uses the one whose tick is nearest to k / (K - 1)."""

    def __init__(self, config: VARTokenizerConfig) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(config.latent_channels, config.phi_ratio) for _ in range(config.num_phi))
        self.index_of_scale = self.nearest_ticks(len(config.patch_nums), config.num_phi)

    @staticmethod
    def nearest_ticks(num_scales: int, num_phi: int) -> list[int]:
        """Index of the convolution of each scale; exact ties (scales 2 and 7 of ten) go up, as released."""
        margin = 1 / (3 * num_phi) if num_phi == 4 else 1 / (2 * num_phi)
        ticks = torch.linspace(margin, 1 - margin, num_phi, dtype=torch.float64, device="cpu")
        at = torch.arange(num_scales, dtype=torch.float64, device="cpu") / max(num_scales - 1, 1)
        distance = (ticks[None] - at[:, None]).abs()
        return [int(torch.nonzero(row <= row.min() + 1e-9)[-1]) for row in distance]

    def forward(self, h_BDhw: torch.Tensor, scale: int) -> torch.Tensor:
        return self.qresi_ls[self.index_of_scale[scale]](h_BDhw)


class MultiScaleQuantizer(nn.Module):
    """Residual quantisation of a latent, coarse to fine: every scale codes what the coarser ones left over.

    All of it runs in the dtype of the codebook, without autocast, because f_hat is a long sum.
    """

    def __init__(self, config: VARTokenizerConfig) -> None:
        super().__init__()
        self.patch_nums = list(config.patch_nums)
        self.side = self.patch_nums[-1]
        self.rate_weight = config.rate_weight
        self.embedding = nn.Embedding(config.vocab_size, config.latent_channels)
        self.quant_resi = SharedPhi(config)
        # how often each code was chosen at each scale; the prior of entropy-constrained quantisation
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.patch_nums), config.vocab_size))

    def nearest(self, rest_NC: torch.Tensor, scale: int) -> torch.Tensor:
        """Codebook indices (N,) of residual vectors (N, D): least squared distance plus the rate term, if any."""
        codebook = self.embedding.weight
        distance_NV = rest_NC.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * rest_NC @ codebook.T
        if self.rate_weight > 0:
            distance_NV = distance_NV - self.rate_weight * self.log_frequency(scale)
        return distance_NV.argmin(1)

    def log_frequency(self, scale: int) -> torch.Tensor:
        """Log of how often each code was chosen at a scale (V,); all the same where usage was not recorded."""
        hits = self.ema_vocab_hit_SV[scale] + 1e-3
        return (hits / hits.sum()).log()

    def contribution(self, ids_Bl: torch.Tensor, scale: int) -> torch.Tensor:
        """What the tokens (B, p_k^2) of one scale add to f_hat: (B, D, h, w)."""
        side = self.patch_nums[scale]
        h_BDpp = self.embedding(ids_Bl).transpose(1, 2).unflatten(2, (side, side))
        if side != self.side:
            h_BDpp = F.interpolate(h_BDpp, size=(self.side, self.side), mode="bicubic")
        return self.quant_resi(h_BDpp, scale)

    def split(self, ids_BT: torch.Tensor) -> list[torch.Tensor]:
        """Tokens of each scale. Accepts the tokens of the first scales only, if they are whole.

        Raises:
            ValueError: a scale is cut in the middle.
        """
        starts, at = [], 0
        for side in self.patch_nums:
            if at == ids_BT.shape[1]:
                break
            starts.append(side * side)
            at += side * side
        if at != ids_BT.shape[1] or not starts:
            whole = sum(side * side for side in self.patch_nums)
            raise ValueError(
                f"a picture has {whole} visual tokens (scales of side {self.patch_nums}), got {ids_BT.shape[1]}: "
                "the stream was cut inside a scale"
            )
        return list(ids_BT.split(starts, dim=1))

    def accumulate(self, ids_BT: torch.Tensor) -> Iterator[torch.Tensor]:
        """f_hat (B, D, h, w) after each scale that `ids_BT` holds."""
        with torch.autocast(ids_BT.device.type, enabled=False):
            f_hat = 0.0
            for scale, ids_Bl in enumerate(self.split(ids_BT)):
                f_hat = f_hat + self.contribution(ids_Bl, scale)
                yield f_hat

    def query_features(self, f_hat_BDhw: torch.Tensor, scale: int) -> torch.Tensor:
        """Features (B, p_k^2, D) of the queries of `scale`, from the f_hat of the scales before it."""
        side = self.patch_nums[scale]
        return F.interpolate(f_hat_BDhw, size=(side, side), mode="area").flatten(2).transpose(1, 2)

    def next_scale_inputs(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Teacher-forcing features (B, T - 1, D): row i is the query for token i + 2 (VAR's `idxBl_to_var_input`)."""
        sizes = [ids_Bl.shape[1] for ids_Bl in self.split(ids_BT)]
        if len(sizes) == 1:
            return self.embedding.weight.new_zeros(ids_BT.shape[0], 0, self.embedding.embedding_dim)
        f_hats = self.accumulate(ids_BT[:, : -sizes[-1]])
        return torch.cat([self.query_features(f_hat, k + 1) for k, f_hat in enumerate(f_hats)], dim=1)

    def rest_at_scale(self, rest_BDhw: torch.Tensor, scale: int) -> torch.Tensor:
        """The residual, reduced to the side of `scale` and laid out as (B * p_k^2, D)."""
        side = self.patch_nums[scale]
        reduced = rest_BDhw if side == self.side else F.interpolate(rest_BDhw, size=(side, side), mode="area")
        return reduced.permute(0, 2, 3, 1).flatten(0, 2)

    @torch.no_grad()
    def encode(self, f_BDhw: torch.Tensor) -> torch.Tensor:
        """Latent (B, D, h, w) to visual tokens (B, T)."""
        with torch.autocast(f_BDhw.device.type, enabled=False):
            rest, ids = f_BDhw.to(self.embedding.weight.dtype), []
            for scale in range(len(self.patch_nums)):
                ids_Bl = self.nearest(self.rest_at_scale(rest, scale), scale).view(rest.shape[0], -1)
                rest = rest - self.contribution(ids_Bl, scale)
                ids.append(ids_Bl)
            return torch.cat(ids, dim=1)

    @torch.no_grad()
    def record_usage(self, ids_BT: torch.Tensor, decay: float = 0.99) -> None:
        """Moves the frequency of each code at each scale towards that of a batch."""
        for scale, ids_Bl in enumerate(self.split(ids_BT)):
            hits = torch.bincount(ids_Bl.flatten(), minlength=self.embedding.num_embeddings).float()
            self.ema_vocab_hit_SV[scale].lerp_(hits / ids_Bl.numel(), 1 - decay)

    @torch.no_grad()
    def restart_unused(self, f_BDhw: torch.Tensor, below: float = 1e-6) -> int:
        """Moves codes that no scale uses onto random (shrunk) vectors of a latent; returns how many.

        Before the first step no code has been used: then this initialises the codebook from data.
        """
        unused = (self.ema_vocab_hit_SV.amax(0) < below).nonzero()[:, 0]
        vectors = f_BDhw.permute(0, 2, 3, 1).flatten(0, 2).to(self.embedding.weight.dtype)
        chosen = vectors[torch.randint(len(vectors), (len(unused),), device=vectors.device)]
        self.embedding.weight[unused] = chosen * torch.rand_like(chosen[:, :1])
        self.ema_vocab_hit_SV[:, unused] = 10 * below
        return len(unused)


def group_norm(config: VARTokenizerConfig, channels: int) -> nn.Module:
    if config.norm_num_groups == 0:
        return nn.Identity()
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)


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
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


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
        return self.conv_out(F.silu(self.norm_out(h)))


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
        return self.conv_out(F.silu(self.norm_out(self.up[0](h))))


@dataclass
class VARTokenizerOutput(ModelOutput):
    """`loss` for training, the reconstruction (B, 3, H, W) in [-1, 1] and the visual tokens (B, T)."""

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    visual_ids: torch.Tensor | None = None
    vq_loss: torch.Tensor | None = None


class VARTokenizer(LoadsReleased, PreTrainedModel):
    """Multi-scale VQ-VAE of VAR. `encode` and `decode` are what the processor calls; `forward` trains it."""

    config_class = VARTokenizerConfig
    _released_arguments = staticmethod(visual_tokenizer_arguments)
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: VARTokenizerConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 3, padding=1)
        self.quantize = MultiScaleQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 3, padding=1)
        self.decoder = Decoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Phi):
            init.dirac_(module.weight)  # phi begins as the identity: the codebook can be learned at once
            init.zeros_(module.bias)
        elif isinstance(module, LastConv2d):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="linear")
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            bound = 1 / module.num_embeddings
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, MultiScaleQuantizer):
            init.zeros_(module.ema_vocab_hit_SV)
        else:
            super()._init_weights(module)

    def latent(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Picture (B, 3, H, W) in [-1, 1] to the latent before quantisation (B, D, h, w)."""
        side = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[2:] != (side, side):
            raise ValueError(f"pixel_values must be (B, 3, {side}, {side}), got {tuple(pixel_values.shape)}")
        return self.quant_conv(self.encoder(pixel_values.to(self.dtype)))

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to visual tokens (B, T)."""
        return self.quantize.encode(self.latent(pixel_values))

    def decode_latent(self, f_hat_BDhw: torch.Tensor) -> torch.Tensor:
        """f_hat (B, D, h, w) to pictures (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(f_hat_BDhw))

    @torch.no_grad()
    def decode(self, visual_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, T), or those of the first whole scales, to pictures (B, 3, H, W): one decoder pass."""
        *_, f_hat = self.quantize.accumulate(visual_ids)
        return self.decode_latent(f_hat).clamp(-1, 1)

    @torch.no_grad()
    def decode_scales(self, visual_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, T) to the picture after every scale (B, K, 3, H, W), coarse to fine."""
        f_hats = list(self.quantize.accumulate(visual_ids))
        pictures = self.decode_latent(torch.cat(f_hats)).clamp(-1, 1)  # (K * B, 3, H, W), scale-major
        return pictures.unflatten(0, (len(f_hats), -1)).transpose(0, 1)

    @torch.no_grad()
    def next_scale_inputs(self, visual_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, T) to the teacher-forcing features of scales 2..K (B, T - 1, D)."""
        return self.quantize.next_scale_inputs(visual_ids)

    def quantize_straight_through(
        self, f_BDhw: torch.Tensor, num_scales: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The quantised latent with the gradient of the latent itself, the VQ loss, and the visual tokens."""
        visual_ids = self.quantize.encode(f_BDhw)
        if self.training and self.quantize.embedding.weight.requires_grad:  # usage decides codes: frozen with them
            self.quantize.record_usage(visual_ids)
        f_hats = list(self.quantize.accumulate(visual_ids))
        codebook_loss = torch.stack([F.mse_loss(f, f_BDhw.detach()) for f in f_hats]).mean()
        commitment = F.mse_loss(f_hats[-1].detach(), f_BDhw)
        vq_loss = codebook_loss + self.config.commitment_weight * commitment
        if num_scales is not None:  # what the decoder must make of a coarse f_hat says nothing about the latent
            return f_hats[num_scales - 1].detach(), vq_loss, visual_ids
        return f_BDhw + (f_hats[-1] - f_BDhw).detach(), vq_loss, visual_ids

    def forward(
        self, pixel_values: torch.Tensor, num_scales: int | None = None, masks: bool = False, **kwargs
    ) -> VARTokenizerOutput:
        """Reconstruction and training loss.

        Args:
            pixel_values: pictures (B, 3, H, W) in [-1, 1].
            num_scales: reconstruct from the first `num_scales` scales only, so that coarse scales learn to say what
                they can (quantiser drop-out); 0 leaves the quantiser out (a plain autoencoder, to begin with); None
                for all scales.
            masks: the pictures are black and white: twice the cross-entropy of "white", with 4 x as logit of x in
                [-1, 1], instead of L1 + L2.

        The VQ loss is VAR's, but that the latent commits to the last f_hat alone: committing to the coarse ones, as
        VAR does, would wash out detail in a small model.
        """
        f_BDhw = self.latent(pixel_values).float()
        visual_ids, vq_loss = None, f_BDhw.new_zeros(())
        if num_scales != 0:
            f_BDhw, vq_loss, visual_ids = self.quantize_straight_through(f_BDhw, num_scales)
        picture = self.decode_latent(f_BDhw).float()
        if masks:
            loss = 2 * F.binary_cross_entropy_with_logits(4 * picture, (pixel_values + 1) / 2)
        else:
            loss = F.l1_loss(picture, pixel_values) + F.mse_loss(picture, pixel_values)
        return VARTokenizerOutput(
            loss=loss + vq_loss, reconstruction=picture.clamp(-1, 1), visual_ids=visual_ids, vq_loss=vq_loss
        )


__all__ = ["MultiScaleQuantizer", "VARTokenizer"]
