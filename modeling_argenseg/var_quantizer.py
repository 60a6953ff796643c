"""VAR's multi-scale residual quantizer: a latent to visual tokens and back.

A module of its own because the language model holds a frozen copy of it: from the visual tokens in its stream it builds
the inputs of the next scale.

Shapes: B batch, D latent channels, V codebook entries, K scales of side p_1..p_K, T = sum of p_k squared,
h = w = p_K the side of the latent.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_argenseg import VARTokenizerConfig


class Phi(nn.Conv2d):
    """`phi(x) = (1 - r) x + r conv3x3(x)`: mends what up-sampling a coarse scale blurs."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1, dtype=torch.float32)
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

    All of it runs in the dtype of the codebook, without autocast, because f_hat is a long sum. It is made and loaded in
    fp32, whatever the default dtype and `dtype=`; only a cast afterwards (`model.to(torch.bfloat16)`) rounds it.
    """

    def __init__(self, config: VARTokenizerConfig) -> None:
        super().__init__()
        self.patch_nums = list(config.patch_nums)
        self.side = self.patch_nums[-1]
        rates = config.rate_weight
        self.rate_weights = (
            [float(r) for r in rates] if isinstance(rates, list | tuple) else [rates] * len(config.patch_nums)
        )
        self.embedding = nn.Embedding(config.vocab_size, config.latent_channels, dtype=torch.float32)
        self.quant_resi = SharedPhi(config)
        # how often each code was chosen at each scale; the prior of entropy-constrained quantisation
        self.register_buffer(
            "ema_vocab_hit_SV", torch.zeros(len(self.patch_nums), config.vocab_size, dtype=torch.float32)
        )

    def nearest(self, rest_NC: torch.Tensor, scale: int) -> torch.Tensor:
        """Codebook indices (N,) of residual vectors (N, D): least squared distance plus the rate term, if any."""
        codebook = self.embedding.weight
        price_V = codebook.square().sum(1)
        if self.rate_weights[scale] > 0:
            price_V = price_V - (self.rate_weights[scale] * self.log_frequency(scale)).to(price_V.dtype)
        # without the length of the vectors, which is the same for all codes
        return torch.addmm(price_V, rest_NC, codebook.T, alpha=-2).argmin(1)

    def log_frequency(self, scale: int) -> torch.Tensor:
        """Log of how often each code was chosen at a scale (V,); all the same where usage was not recorded."""
        hits = self.ema_vocab_hit_SV[scale] + 1e-3
        return (hits / hits.sum()).log()

    def contribution(self, ids_Bl: torch.Tensor, scale: int) -> torch.Tensor:
        """What the tokens (B, p_k^2) of one scale add to f_hat: (B, D, h, w)."""
        return self.spread(self.embedding(ids_Bl), scale)

    def spread(self, codes_BlD: torch.Tensor, scale: int) -> torch.Tensor:
        """Codes (B, p_k^2, D) of one scale, as what they add to f_hat: (B, D, h, w)."""
        side = self.patch_nums[scale]
        with torch.autocast(codes_BlD.device.type, enabled=False):
            h_BDpp = codes_BlD.transpose(1, 2).unflatten(2, (side, side))
            if side != self.side:
                h_BDpp = F.interpolate(h_BDpp, size=(self.side, self.side), mode="bicubic")
            return self.quant_resi(h_BDpp, scale)

    def split(self, ids_BT: torch.Tensor) -> list[torch.Tensor]:
        """Tokens of each scale. Accepts the tokens of the first scales only, if they are whole.

        Raises:
            ValueError: a scale is cut in the middle.
        """
        every, length = [side * side for side in self.patch_nums], ids_BT.shape[1]
        sizes = [size for size, end in zip(every, accumulate(every), strict=True) if end <= length]
        if sum(sizes) != length or not sizes:
            raise ValueError(
                f"a picture has {sum(every)} visual tokens (scales of side {self.patch_nums}), got {length}: "
                "the stream was cut inside a scale"
            )
        return list(ids_BT.split(sizes, dim=1))

    def accumulate(self, ids_BT: torch.Tensor) -> Iterator[torch.Tensor]:
        """f_hat (B, D, h, w) after each scale that `ids_BT` holds."""
        f_hat = 0.0
        for scale, ids_Bl in enumerate(self.split(ids_BT)):
            f_hat = f_hat + self.contribution(ids_Bl, scale)
            yield f_hat

    def query_features(self, f_hat_BDhw: torch.Tensor, scale: int) -> torch.Tensor:
        """Features (B, p_k^2, D) of the queries of `scale`, from the f_hat of the scales before it."""
        side = self.patch_nums[scale]
        return area(f_hat_BDhw, side).flatten(2).transpose(1, 2)

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
        reduced = rest_BDhw if side == self.side else area(rest_BDhw, side)
        return reduced.permute(0, 2, 3, 1).flatten(0, 2)

    @torch.no_grad()
    def encode(
        self, f_BDhw: torch.Tensor, choose: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Latent (B, D, h, w) to visual tokens (B, T).

        Args:
            f_BDhw: the latent.
            choose: residual vectors (B * p_k^2, D) and their scale to the tokens (B * p_k^2,) that stand for them;
                default: `nearest`. Finer scales code what these leave over, whatever they are.
        """
        choose = self.nearest if choose is None else choose
        with torch.autocast(f_BDhw.device.type, enabled=False):
            rest, ids = f_BDhw.to(self.embedding.weight.dtype), []
            for scale in range(len(self.patch_nums)):
                ids_Bl = choose(self.rest_at_scale(rest, scale), scale).view(len(rest), self.patch_nums[scale] ** 2)
                rest = rest - self.contribution(ids_Bl, scale)
                ids.append(ids_Bl)
            return torch.cat(ids, dim=1)


def area(values_BDhw: torch.Tensor, side: int) -> torch.Tensor:
    """Means over areas (B, D, side, side). Apple GPUs make them only of sides that divide: the CPU makes the others."""
    if values_BDhw.device.type == "mps" and values_BDhw.shape[-1] % side:
        return F.interpolate(values_BDhw.cpu(), size=(side, side), mode="area").to(values_BDhw.device)
    return F.interpolate(values_BDhw, size=(side, side), mode="area")


__all__ = ["MultiScaleQuantizer", "Phi", "SharedPhi"]
