"""Masks as people have them, made into black and white pictures, and pictures back into masks."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from .image_inputs import is_file, open_image, to_numpy

FEW_LABELS = 24  # values that a picture may have and still be a map of labels, as likely as a soft mask


def load_mask(source: Any) -> np.ndarray:
    """Load one mask in any accepted form.

    Args:
        source: `PIL.Image`, path, URL, bytes of a file, COCO RLE dict (`{"size": [H, W], "counts": ...}`, compressed or
            not), or an array or tensor of shape (H, W), (H, W, 1), (1, H, W) or (H, W, 3) with equal channels, that
            holds at most two values out of {False, True}, {0, 1} or {0, 255}.

    Returns:
        bool array (H, W), true on the object.

    Raises:
        ValueError: empty, unreadable or not black and white; the message says what to do.
        TypeError: something that is no mask at all.
    """
    if isinstance(source, dict):
        return _decode_rle(source)
    if not isinstance(source, Image.Image) and is_file(source):
        source = open_image(source)
    if isinstance(source, Image.Image):
        return _binary(_drop_channels(_pil_to_array(source)))
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _binary(_drop_channels(to_numpy(source)))
    raise TypeError(f"a mask must be a PIL image, path, array, tensor or COCO RLE dict, not {type(source).__name__}")


def _pil_to_array(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert("RGB" if image.mode == "RGBA" else "L")
    if image.mode == "P":
        # A palette of black and white says what the indices mean; coloured ones are label maps, whose indices count.
        colours = np.asarray(image.convert("RGB"))
        if np.isin(colours, (0, 255)).all() and (colours == colours[..., :1]).all():
            return colours
    return np.asarray(image)


def _drop_channels(array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 1), (1, H, W) or (H, W, 3) with equal channels -> (H, W)."""
    shape = array.shape
    if array.ndim == 3 and shape[-1] == 1:
        array = array[..., 0]
    elif array.ndim == 3 and shape[-1] == 3:
        if not (array == array[..., :1]).all():
            raise ValueError("the mask is a colour picture (its RGB channels differ); pass one channel of 0 and 255")
        array = array[..., 0]
    elif array.ndim == 3 and shape[0] == 1:
        array = array[0]
    if array.ndim != 2:
        raise ValueError(f"a mask must be (H, W), (H, W, 1), (1, H, W) or grey (H, W, 3); got the shape {shape}")
    if 0 in shape:
        raise ValueError(f"the mask is empty: shape {shape}")
    return array


def _binary(array: np.ndarray) -> np.ndarray:
    """(H, W) of {False, True}, {0, 1} or {0, 255} -> bool (H, W)."""
    if array.dtype == np.bool_:
        return array
    black = array == 0  # comparing costs a tenth of sorting, which np.unique does
    if any((black | (array == white)).all() for white in (1, 255)):
        return ~black
    values = np.unique(array)
    if len(values) <= 2:
        raise ValueError(
            f"the mask holds the values {values.tolist()}, not 0 and 1 or 0 and 255; "
            f"compare first, for example: mask == {values[-1]}"
        )
    raise ValueError(f"the mask has {len(values)} distinct values; {_what_to_do(values)}")


def _what_to_do(values: np.ndarray) -> str:
    """How a picture with these values becomes a mask: a soft mask reaches towards 255, a label map has few labels."""
    if values.max() <= 1:
        return "threshold it first: mask > 0.5"
    threshold = "threshold it first: mask > 127"
    if len(values) > FEW_LABELS and 127 < values.max() <= 255:
        return threshold
    labels = [int(value) for value in values[values > 0] if value < 128 and value == int(value)]
    compare = f"a label map? Compare: mask == {labels[-1] if labels else 'LABEL'}"
    return f"{compare}; a soft mask? Then {threshold}" if 127 < values.max() <= 255 else compare


def _decode_rle(rle: dict) -> np.ndarray:
    """COCO RLE, compressed (`counts` is str or bytes) or not (list of int) -> bool (H, W)."""
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ImportError("COCO RLE masks need pycocotools: pip install pycocotools") from error
    try:
        height, width = (int(side) for side in rle["size"])
        counts = rle["counts"]
        plain = isinstance(counts, (list, tuple))
        # pycocotools leaves pixels that no run covers as they lie in memory
        covered = sum(counts) if plain else int(_run_lengths(counts).sum())
        if covered != height * width:
            raise ValueError(f"its counts cover {covered} pixels, its size {height}x{width}")
        if plain:
            rle = coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
        decoded = coco_mask.decode({"size": [height, width], "counts": rle["counts"]})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a COCO RLE mask ({error}); it needs 'size': [H, W] and 'counts'") from error
    if 0 in decoded.shape:
        raise ValueError(f"the mask is empty: shape {decoded.shape}")
    return decoded.astype(bool)


def _run_lengths(counts: str | bytes) -> np.ndarray:
    """Runs of a compressed COCO RLE, int64 (R,).

    A number is written in digits of five bits, the lowest first, from "0" on; a sixth bit says that more follow, the
    highest bit of the last digit is the sign. From the fourth run on it is the difference from the last but one.

    Raises:
        ValueError: characters that are no digits, a number that is cut off, a negative run.
        TypeError: neither str nor bytes.
    """
    text = counts.encode("ascii") if isinstance(counts, str) else memoryview(counts)
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - ord("0")
    if not len(digits):
        return digits
    if digits.min() < 0 or digits.max() > 63:
        raise ValueError("its counts hold a character that no compressed mask has")
    last = digits < 32
    if not last[-1]:
        raise ValueError("its counts are cut off")
    starts = np.flatnonzero(np.concatenate(([True], last[:-1])))
    lengths = np.diff(starts, append=len(digits))
    if lengths.max() > 7:  # 35 bits
        raise ValueError("its counts hold a number that is too large")
    place = np.arange(len(digits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << 5 * place, starts)
    runs -= np.where(digits[last] & 16, np.int64(1) << 5 * lengths, 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    if runs.min() < 0:
        raise ValueError("its counts hold a negative run")
    return runs


def mask_to_picture(mask: np.ndarray, sizes: list[int], channels: int = 3) -> torch.Tensor:
    """Draw a bool mask (H, W) as a black and white picture, squashed through `sizes` one after another.

    Returns:
        float tensor (channels, S, S) in [-1, 1], S the last of `sizes`.
    """
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    for size in sizes:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    values_SS = torch.from_numpy(np.array(picture)).float() / 255 * 2 - 1
    return values_SS.expand(channels, -1, -1)


def picture_to_map(picture: torch.Tensor, size: tuple[int, int] | None) -> np.ndarray:
    """How white a picture (channels, h, w) in [-1, 1] is: its channels' mean, in [0, 1], at `size` = (height, width).

    Returns:
        float32 array (height, width), or (h, w) when `size` is None.
    """
    white_hw = (picture.float().mean(dim=0) / 2 + 0.5).clamp(0, 1).cpu()
    if size is not None:
        # antialias only acts when shrinking, as PIL's own bilinear does
        white_hw = F.interpolate(white_hw[None, None], size=size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
    return white_hw.numpy()
