"""Queries that know, before anything is drawn, whether their cell belongs to what is asked for.

Teacher forcing hides what a model that draws scale by scale has to learn first: the coarse scales of the right mask say
where the thing is, so the finer ones need not find it, and the loss hardly falls for a model that listens to the words.
Here every query says, by one direction of its hidden state, how much of its cell the mask covers, as in semantic
segmentation; and masks of one image are told from each other: a request must fit its own mask better than those of the
others, and a mask its own request. Use it with pictures that slip (see `PictureEncoder`), whose coarse scales say
nothing, and with scenes that ask for everything by its name (preset `names`). It has no parameters; there is nothing to
be kept after training.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

GAIN = 4.0  # hidden states after the last norm have about unit size in every direction
USUAL = 0.1  # of a cell that a mask covers
SAME = 0.5  # a mask of which another covers so much is that of the same request, for the comparison
OTHERS_WEIGHT = 0.2  # of the comparison, whose losses are ten times as large as those of cells


def shares_of_queries(masks: torch.Tensor, patch_nums: list[int]) -> torch.Tensor:
    """How much of its cell a mask covers: masks (M, H, W) in [0, 1] to (M, T), scale by scale, row by row."""
    scales = [F.adaptive_avg_pool2d(masks[:, None].float(), side).flatten(1) for side in patch_nums]
    return torch.cat(scales, dim=1)


def at_queries(model: Any, hidden: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the hidden states (B, L, hidden) of a stream (B, L) those at the queries of its pictures (N, T, hidden), and
    the rows (N,) of these."""
    rows, columns = model.model.find_pictures(input_ids)
    places = columns[:, None] + torch.arange(model.config.picture_length, device=columns.device)
    return hidden[rows[:, None], places], rows


def mean_on_masks(values: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Means (N, M) of values (N, cells) over what masks cover, shares (M, cells); zero where they cover nothing."""
    with torch.autocast(values.device.type, enabled=False):
        return values @ (shares / shares.sum(1, keepdim=True).clamp(min=1e-6)).T


class MaskRegions(nn.Module):
    """The loss.

    Args:
        hidden_size: width of the language model.
        patch_nums: sides of the scales that are drawn.
    """

    def __init__(self, hidden_size: int, patch_nums: list[int]) -> None:
        super().__init__()
        self.sizes = [side * side for side in patch_nums]
        signs = torch.ones(hidden_size)
        signs[1::2] = -1.0  # any direction will do; this one is at right angles to a shift of all
        self.register_buffer("direction", signs / math.sqrt(hidden_size), persistent=False)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., hidden) to logits (...) of the cell's share."""
        return GAIN * (hidden.float() * self.direction).sum(-1) + math.log(USUAL / (1 - USUAL))

    def forward(self, hidden: torch.Tensor, shares: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy, mean over the queries of a scale, then over scales, and the comparison at the finest.

        Args:
            hidden: last hidden states at the queries (N, T, hidden).
            shares: (N, T), see `shares_of_queries`.
            images: (N,): which image each is about; only masks of the same one are compared.
        """
        logits = self.logits(hidden)
        cells = F.binary_cross_entropy_with_logits(logits, shares, reduction="none").split(self.sizes, dim=1)
        loss = torch.stack([scale.mean() for scale in cells]).mean()
        return loss + OTHERS_WEIGHT * self.compare(logits[:, -self.sizes[-1] :], shares[:, -self.sizes[-1] :], images)

    @staticmethod
    def compare(logits: torch.Tensor, shares: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of which mask of its image a request fits, and of which request a mask fits; fitting is the
        mean logit on a mask. Zero where no image has two."""
        fits = mean_on_masks(logits, shares)  # (requests, masks)
        covered = torch.minimum(shares[:, None], shares[None]).sum(-1) / shares.sum(1).clamp(min=1e-6)
        right, together = covered > SAME, images[:, None] == images
        right = (right | torch.eye(len(images), dtype=torch.bool, device=images.device)) & together
        among = fits.masked_fill(~together, -torch.inf)
        own = fits.masked_fill(~right, -torch.inf)
        return sum(((among.logsumexp(dim) - own.logsumexp(dim)).mean() for dim in (0, 1)), start=logits.sum() * 0.0)
