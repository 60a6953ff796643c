"""Masks that follow the edges of their image: a guided filter (He et al., "Guided Image Filtering", TPAMI 2013). Not in
the paper.

A mask has the resolution of the visual tokenizer's picture, and its outline is of the last scale's cells: a model knows
better which thing is meant than where it ends. The image knows that. In windows nearly two cells wide the map of a
mask is written as a linear function of the image's colours, and what comes out has the image's edges where there are
any. The coefficients vary slowly: they are found on a small copy of the image, and used on the image itself (He and
Sun, "Fast Guided Filter", 2015).
"""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

PER_CELL = 4  # pixels of the small copy for each cell of the last scale, along a side
RADIUS = 3  # of the windows, in these pixels
LEAST_VARIANCE = 1e-4  # of colours in [0, 1]: windows that vary less have no edges, and the map is smoothed there
LARGEST = 1024  # longer side, in pixels, of the image on which the coefficients are used
LEAST_LEFT = 0.25  # where less than this share of what a mask covers around a place would be left, it stays as drawn
SPECK = 1 / 256  # radius, by the image's longer side, of the majority filter that removes specks


class EdgeGuide:
    """The edges of an image, for any number of masks on it.

    Args:
        image: upright RGB.
        cells: along a side of the last scale; see `VARTokenizerConfig.patch_nums`.
    """

    def __init__(self, image: Image.Image, cells: int) -> None:
        self.side = PER_CELL * cells
        self.colours = torch.from_numpy(np.array(shrink(image))).permute(2, 0, 1).float() / 255
        self.small = resize(self.colours, (self.side, self.side))
        products = (self.small[:, None] * self.small).flatten(0, 1)
        self.mean, mean_of_products = window_means(torch.cat([self.small, products])).split([3, 9])
        covariance = mean_of_products.view(3, 3, self.side, self.side) - self.mean[:, None] * self.mean
        covariance = covariance.permute(2, 3, 0, 1)
        covariance.diagonal(dim1=-2, dim2=-1).add_(LEAST_VARIANCE)
        self.inverse = torch.linalg.inv(covariance).permute(2, 3, 0, 1)

    def __call__(self, white: torch.Tensor) -> torch.Tensor:
        """A map (h, w) in [0, 1] of the whole image, of any size, to one with the image's edges: (H, W) in [0, 1], of
        the size of the image, or smaller where that is large (`LARGEST`)."""
        small = resize(white[None], (self.side, self.side))
        mean, mean_of_products = window_means(torch.cat([small, small * self.small])).split([1, 3])
        covariance = mean_of_products - mean * self.mean
        slope = (self.inverse * covariance).sum(1)  # not a product of matrices, which autocast would round
        offset = mean - (slope * self.mean).sum(0, keepdim=True)
        coefficients = resize(window_means(torch.cat([slope, offset])), tuple(self.colours.shape[1:]))
        return ((coefficients[:3] * self.colours).sum(0) + coefficients[3]).clamp(0, 1)

    def follow(self, white: np.ndarray, threshold: float, size: tuple[int, int] | None = None) -> np.ndarray:
        """A map (h, w) in [0, 1], or a bool mask, with the image's edges: float32 (height, width) of `size`, by default
        the map's own. Where most of a thing would vanish that is above the threshold, which has no edges there or is
        too thin for the windows, the map stays as it is."""
        plain = torch.from_numpy(white).float()
        guided = without_specks(self(plain), threshold)
        there = resize(plain[None], tuple(guided.shape))[0]
        above = torch.stack([there > threshold, (there > threshold) & (guided > threshold)])
        before, after = window_means(resize(above.float(), (self.side, self.side)))
        vanish = resize((after < LEAST_LEFT * before)[None].float(), tuple(guided.shape))[0] > 0.5
        guided = torch.where(vanish, there, guided)
        return resize(guided[None], white.shape if size is None else size)[0].clamp(0, 1).numpy()


def shrink(image: Image.Image) -> Image.Image:
    """The image, or a copy of it that has `LARGEST` pixels on its longer side."""
    factor = LARGEST / max(image.size)
    if factor >= 1:
        return image
    return image.resize([max(1, round(factor * side)) for side in image.size], Image.Resampling.BILINEAR)


def without_specks(white: torch.Tensor, threshold: float) -> torch.Tensor:
    """A map (H, W) that is above the threshold where most of the pixels around are, as by a median filter; others keep
    their values."""
    radius = round(SPECK * max(white.shape))
    above = white > threshold
    around = window_means(above[None].float(), radius)[0] > 0.5
    return torch.where(above == around, white, (2 * threshold - white).clamp(0, 1))


def window_means(values: torch.Tensor, radius: int = RADIUS) -> torch.Tensor:
    """Means (C, H, W) of values (C, H, W) over windows around each place, cut at the borders."""
    width = 2 * radius + 1
    for window, padding in (((width, 1), (radius, 0)), ((1, width), (0, radius))):
        values = F.avg_pool2d(values, window, stride=1, padding=padding, count_include_pad=False)
    return values


def resize(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(C, h, w) to (C, *size), bilinear; smoothed first where it shrinks."""
    return F.interpolate(values[None], size=size, mode="bilinear", antialias=True)[0]
