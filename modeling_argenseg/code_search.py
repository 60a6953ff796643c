"""Visual tokens of a mask that are found by decoding them, not by distance in the latent alone.

The nearest code is the best for the latent, not for the picture: what the decoder makes of an error, and what it makes
of the codes around it, the encoder can only guess. Here the tokens of the last scale are tried out, as video encoders
try out their modes (rate-distortion optimisation, Sullivan & Wiegand 1998): along the gradient of what is wrong in the
decoded picture, keeping what makes it better by more than it costs in rarer tokens. The decoder and the codes stay as
they are, and so does every model that draws with them.

Shapes: B pictures, D latent channels, l = h * w cells of the last scale, H = W the side of the picture.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .var_quantizer import MultiScaleQuantizer

STRIDE = 2  # cells that are tried at once stand so far apart that none is a neighbour of another
LONGER, SHORTER = 1.5, 0.4  # what becomes of a cell's step after success and after failure
RATE_WEIGHT = 0.06  # of a nat of a token's surprise, in nats of the picture's pixels
SHARPNESS = 16.0  # times the decoded value is a pixel's logit of white: little but the side of the edge counts
STRETCH = 2  # masks are mostly larger than their pictures; edges are compared where they lie between the pixels, too
LEAST_GRADIENT = 1e-3  # cells whose gradient is shorter than this share of the usual length are skipped
FIRST_STEP = 1.0  # mean length of the first steps, in root mean squares of the length of a code


class CodeSearch:
    """Searches the tokens of the last scale for a batch of masks.

    Args:
        quantizer: its codes.
        decode: f_hat (B, D, h, w) to pictures (B, C, H, W), white where the mean of their channels is positive.
        pixel_values: the pictures (B, C, H, W) in [-1, 1], black and white but for their edges.
        visual_ids: tokens (B, T) to begin with.
    """

    def __init__(
        self,
        quantizer: MultiScaleQuantizer,
        decode: Callable[[torch.Tensor], torch.Tensor],
        pixel_values: torch.Tensor,
        visual_ids: torch.Tensor,
    ) -> None:
        self.quantizer, self.decode, self.side = quantizer, decode, quantizer.side
        self.codebook = quantizer.embedding.weight.detach()
        self.white = (stretched(pixel_values.float(), "bicubic") > 0).float()
        self.coarse, self.tokens = visual_ids.split([visual_ids.shape[1] - self.side**2, self.side**2], dim=1)
        self.price = -RATE_WEIGHT * quantizer.log_frequency(len(quantizer.patch_nums) - 1).float()
        self.f_coarse = 0.0
        if self.coarse.shape[1]:
            *_, self.f_coarse = quantizer.accumulate(self.coarse)

    def pixel_loss(self, codes_BlD: torch.Tensor) -> torch.Tensor:
        """Cross-entropy (B, H, W) of the pixels of the picture that codes of the last scale complete.

        Both pictures are stretched and read like masks: white or not.
        """
        f_hat = self.f_coarse + self.quantizer.spread(codes_BlD, len(self.quantizer.patch_nums) - 1)
        loss = F.binary_cross_entropy_with_logits(edge_logits(self.decode(f_hat)), self.white, reduction="none")
        return F.avg_pool2d(loss, STRETCH)[:, 0]

    def loss_and_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The present pixel loss (B, H, W), and its gradient by the code of every cell (B, l, D)."""
        with torch.enable_grad():
            codes = F.embedding(self.tokens, self.codebook).requires_grad_()
            loss = self.pixel_loss(codes)
            (gradient,) = torch.autograd.grad(loss.sum(), codes)
        return loss.detach(), gradient

    def neighbourhood_loss(self, loss_BHW: torch.Tensor) -> torch.Tensor:
        """Pixel loss (B, H, W) summed over each cell and its eight neighbours (B, l)."""
        cell = loss_BHW.shape[1] // self.side
        cells = F.avg_pool2d(loss_BHW[:, None], cell, divisor_override=1)
        return F.avg_pool2d(cells, 3, stride=1, padding=1, divisor_override=1).flatten(1)

    def cost(self, loss_BHW: torch.Tensor) -> torch.Tensor:
        """What each picture costs at present (B,): the loss of its pixels, and the price of its tokens."""
        return loss_BHW.sum((1, 2)) + self.price[self.tokens].sum(1)

    def candidates(self, wanted_ND: torch.Tensor, reach_N: torch.Tensor) -> torch.Tensor:
        """The codes (N,) that promise most: near to what is wanted, and usual.

        A step of `reach` times the gradient goes to the lowest point of a parabola of curvature 1 / reach.
        """
        codebook = self.codebook.float()
        distance_NV = torch.addmm(codebook.square().sum(1), wanted_ND.float(), codebook.T, alpha=-2)
        return torch.addcmul(distance_NV, reach_N[:, None], self.price, value=2).argmin(1)

    def run(self, steps: int) -> torch.Tensor:
        """The tokens (B, T) after so many steps; those of the beginning for pictures that did not gain."""
        start, group = self.tokens, self.groups()
        loss, gradient = self.loss_and_gradient()
        cost_at_first, length = self.cost(loss), gradient.float().norm(dim=2)
        usual = length.square().sum(1, keepdim=True) / length.sum(1, keepdim=True).clamp(min=1e-12)
        code_length = self.codebook.float().square().sum(1).mean().sqrt()
        reach = (FIRST_STEP * code_length / usual.clamp(min=1e-12)).repeat(1, length.shape[1])
        for step in range(steps):
            tried = (group == step % STRIDE**2) & (gradient.norm(dim=2) > LEAST_GRADIENT * usual)
            codes, others = F.embedding(self.tokens[tried], self.codebook), self.tokens.clone()
            others[tried] = self.candidates(codes - reach[tried][:, None] * gradient[tried], reach[tried])
            changed = others != self.tokens
            loss_then = self.pixel_loss(F.embedding(others, self.codebook))
            gain = self.neighbourhood_loss(loss) - self.neighbourhood_loss(loss_then)
            better = gain > self.price[others] - self.price[self.tokens]
            reach = torch.where(tried, torch.where(changed & ~better, SHORTER, LONGER) * reach, reach)
            self.tokens = torch.where(changed & better, others, self.tokens)
            loss, gradient = self.loss_and_gradient()
        gained = self.cost(loss) < cost_at_first
        return torch.cat([self.coarse, torch.where(gained[:, None], self.tokens, start)], dim=1)

    def groups(self) -> torch.Tensor:
        """Which cells are tried together (l,): numbers below the square of `STRIDE`."""
        at = torch.arange(self.side, device=self.tokens.device) % STRIDE
        return (STRIDE * at[:, None] + at).flatten()


def edge_logits(pictures: torch.Tensor) -> torch.Tensor:
    """Logits of white (B, 1, STRETCH * H, STRETCH * W) of decoded pictures (B, C, H, W), read like masks."""
    return SHARPNESS * stretched(pictures.float(), "bilinear")


def stretched(pictures: torch.Tensor, mode: str) -> torch.Tensor:
    """The mean of the channels of pictures (B, C, H, W), `STRETCH` times as large (B, 1, STRETCH * H, STRETCH * W)."""
    return F.interpolate(pictures.mean(1, keepdim=True), scale_factor=STRETCH, mode=mode)


__all__ = ["CodeSearch", "edge_logits"]
