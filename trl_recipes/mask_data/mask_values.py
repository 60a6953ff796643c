"""Masks as annotation files hold them: a picture's path, COCO RLE, polygons, or nothing at all."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from processing.mask_inputs import load_mask

BEYOND = 0.05  # of the image's side: polygons may reach so far out of it, as annotation tools permit


def split_masks(value: Any) -> list[Any]:
    """A field's value as a list of masks: polygons are one mask, a list of paths, RLEs or pictures several.

    Nothing (null, an empty string, an empty list) is no mask: what was asked for is not there.
    """
    if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and not value):
        return []
    several = isinstance(value, list) and all(isinstance(part, (str, dict, Image.Image)) for part in value)
    return list(value) if several else [value]


def read_mask(value: Any, size: tuple[int, int], root: Path) -> np.ndarray:
    """One mask as a bool array (H, W).

    Args:
        value: path of a picture (relative to `root`), COCO RLE, polygons `[[x1, y1, x2, y2, ...], ...]` or
            `[[[x, y], ...], ...]` in pixels, a `PIL.Image`, an array or rows of pixels.
        size: (height, width) of the image.

    Raises:
        ValueError: there is no such file, it is no mask, or its size is not that of the image.
    """
    if isinstance(value, str):
        value = root / value
        if not value.is_file():
            raise ValueError(f"there is no file {str(value)!r}")
    if _is_rows_of_pixels(value, size):
        value = np.asarray(value)
    try:
        mask = _draw_polygons(value, size) if isinstance(value, list) else load_mask(value)
    except TypeError as error:
        raise ValueError(f"{error}; give a path, COCO RLE or polygons") from None
    if mask.shape != tuple(size):
        raise ValueError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]} (width x height), its image {size[1]}x{size[0]}: give the "
            "mask at the size of the upright image"
        )
    return mask


def _draw_polygons(value: list, size: tuple[int, int]) -> np.ndarray:
    """The union of polygons, as COCO draws them. Raises ValueError: not polygons, or not of this image."""
    polygons = [value] if _is_polygon(value) else value
    flat = []
    for polygon in polygons:
        if not isinstance(polygon, list) or not _is_polygon(polygon):
            raise ValueError("a polygon is a list of at least three points, [x1, y1, x2, y2, ...] or [[x, y], ...]")
        flat.append([float(number) for point in polygon for number in (point if isinstance(point, list) else [point])])
        for numbers, side, name in ((flat[-1][0::2], size[1], "x"), (flat[-1][1::2], size[0], "y")):
            if min(numbers) < -BEYOND * side or max(numbers) > (1 + BEYOND) * side:
                raise ValueError(
                    f"a polygon has {name} from {min(numbers):g} to {max(numbers):g}, the upright image goes to {side};"
                    " was it drawn on the image in another size, or before EXIF turned it upright?"
                )
    mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, *size))).astype(bool)
    if not mask.any():
        raise ValueError(
            "its polygons cover no pixel of the image; are they in pixels, x first? An empty list: not there"
        )
    return mask


def _is_rows_of_pixels(value: Any, size: tuple[int, int]) -> bool:
    """Whether these are the lists that a table or JSON makes of an array (H, W): booleans, or just as many numbers as
    the image has pixels. Polygons are lists of numbers, too, which may all be 0 and 255."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        return False
    widths = {len(row) for row in value}
    return isinstance(value[0][0], bool) or (len(value), *widths) == tuple(size)


def _is_polygon(value: list) -> bool:
    if all(isinstance(point, (list, tuple)) and len(point) == 2 for point in value):
        numbers = [number for point in value for number in point]
    else:
        numbers = value
    return len(numbers) >= 6 and len(numbers) % 2 == 0 and all(_is_number(number) for number in numbers)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def union_of(masks: list[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """The union (H, W) of RLE masks; of none, an empty mask of this (height, width)."""
    return np.logical_or.reduce([load_mask(mask) for mask in masks]) if masks else np.zeros(size, dtype=bool)
