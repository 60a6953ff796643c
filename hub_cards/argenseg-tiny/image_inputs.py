"""Images as people have them, made into the one kind the image processor sees: upright 8-bit RGB `PIL.Image`.

What is kept and what is not: EXIF rotation is applied; transparent pixels are laid over white, as viewers and browsers
show cut-outs; 16-bit values are scaled to 8 bits, not clipped; of an animation the first frame is taken.

Values of fewer bits in 16-bit samples, as many cameras write them, cannot be told from a dark image: they are taken as
they are, with a warning. (PNG's sBIT chunk says nothing about it: by the standard such values fill all 16 bits.)
"""

import base64
import os
import warnings
from collections.abc import Iterable
from io import BytesIO
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

TIMEOUT_S = 30
BYTES = (bytes, bytearray, memoryview)
FEWER_BITS = (8, 10, 12, 14)  # that values in 16-bit samples may have


def is_file(source: Any) -> bool:
    """Whether it is an image file: a path, URL, base64 string, its bytes, or a binary file that is open."""
    return isinstance(source, (str, os.PathLike, *BYTES)) or callable(getattr(source, "read", None))


def describe(source: Any) -> str:
    """A short name of an input for error messages: a path or URL itself, of long strings the beginning."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        return repr(text if len(text) <= 200 else text[:60] + "...")
    return f"the given {type(source).__name__}"


def open_image(source: Any) -> Image.Image:
    """Open a path, `http(s)://` or `data:` URL, base64 string, bytes or binary file with PIL, in the file's own mode.

    Raises:
        ValueError: nothing there, not an image, a broken or a dangerously large one; the message names the source.
    """
    try:
        image = Image.open(_file_of(source))
        image.load()
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read an image from {describe(source)}: {error}") from error
    return image


def _file_of(source: Any) -> Any:
    if isinstance(source, BYTES):
        return BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        return source
    source = os.fspath(source)
    if source.startswith(("http://", "https://")):
        # some hosts turn urllib's own name away
        with urlopen(Request(source, headers={"User-Agent": "transformers"}), timeout=TIMEOUT_S) as response:
            return BytesIO(response.read())
    if os.path.exists(source):
        return source
    try:
        encoded = source.split(",", 1)[1] if source.startswith("data:") else source
        encoded = "".join(encoded.split()).translate(str.maketrans("-_", "+/"))  # lines, and base64 for URLs
        file = BytesIO(base64.b64decode(encoded, validate=True))
        Image.open(file)
    except (IndexError, OSError, ValueError):
        raise ValueError("no such file, and neither a URL nor base64 of an image") from None
    file.seek(0)
    return file


def load_image(source: Any) -> Image.Image:
    """Load one image in any accepted form as an upright RGB `PIL.Image` of 8 bits a channel.

    Args:
        source: `PIL.Image`, path, URL, base64 string, bytes of a file, an open binary file, or an array or tensor of
            shape (H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4. Arrays hold 0..255 (uint8), 0..65535 (uint16), 0..1
            (floats) or booleans.

    Warns:
        UserWarning: the 16-bit values of a grey image or an array are so low that they may have fewer bits.

    Raises:
        ValueError: broken, empty or ambiguous input.
        TypeError: something that is no image at all.
    """
    if isinstance(source, Image.Image):
        return _pil_to_rgb(source, describe(source))
    if is_file(source):
        return _pil_to_rgb(open_image(source), describe(source))
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _array_to_rgb(source, describe(source))
    raise TypeError(f"an image must be a PIL image, path, URL, bytes, array or tensor, not {type(source).__name__}")


def load_images(sources: Iterable[Any]) -> list[Image.Image | None]:
    """Images as `load_image` makes them, None where there is none; what is given several times is read once."""
    sources = list(sources)
    different = {id(source): source for source in sources}
    read = {key: None if source is None else load_image(source) for key, source in different.items()}
    return [read[id(source)] for source in sources]


def _pil_to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"the image is empty: {image.width}x{image.height} pixels")
    has_12_bits = isinstance(image, TiffImageFile) and image.tag_v2.get(BITSPERSAMPLE) == (12,)
    try:
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:  # a lazily opened file that turns out to be broken
        raise ValueError(f"cannot read the image {getattr(image, 'filename', '')!r}: {error}") from error
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        values = values << 4 | values >> 8 if has_12_bits else values  # 4095 becomes 65535
        return Image.fromarray(_to_uint8(values, name)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """An array or a tensor of any dtype (bfloat16 too) as an array."""
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu()
    return (array.float() if array.is_floating_point() else array).numpy()


def _array_to_rgb(source: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    prefer_first = isinstance(source, torch.Tensor)
    array = to_numpy(source)
    if 0 in array.shape or array.ndim not in (2, 3):
        raise ValueError(f"an image array must be (H, W), (H, W, C) or (C, H, W) and not empty; got {array.shape}")
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
        if not first and not last:
            raise ValueError(f"an image array needs 1, 3 or 4 channels, first or last; got the shape {array.shape}")
        if first and (prefer_first or not last):
            array = np.moveaxis(array, 0, -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    return _pil_to_rgb(Image.fromarray(np.ascontiguousarray(_to_uint8(array, name))), name)


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    """Bring pixel values to 0..255 by their kind: booleans, 8-bit, 16-bit (also in wider integers), floats in 0..1."""
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        return array
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.floating):
        if not (low >= 0 and high <= 1):  # NaN also ends here
            raise ValueError(f"a float image must hold values in [0, 1]; got [{low}, {high}]: rescale it first")
        return np.rint(array * 255).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"an integer image must hold 8- or 16-bit values; got [{low}, {high}]")
    is_16_bit = (array.dtype.kind == "u" and array.dtype.itemsize == 2) or high > 255
    if not is_16_bit:
        return array.astype(np.uint8)
    _warn_of_fewer_bits(int(high), name)
    return np.rint(array / 257).astype(np.uint8)


def _warn_of_fewer_bits(high: int, name: str) -> None:
    """Nothing says how many bits the values have: a guess would make dark images bright."""
    bits = next((bits for bits in FEWER_BITS if high < 2**bits), None)
    if bits is not None and high:
        warnings.warn(
            f"the largest of the 16-bit values of {name} is {high}: it comes out dark, {round(high / 257)} of 255 at "
            f"the most. If its values have {bits} bits, multiply them by {2 ** (16 - bits)} first",
            stacklevel=5,  # who called load_image
        )


def _is_stack(items: Any, kind: str) -> bool:
    """Whether an array holds several images (4-D) or several masks (3-D that is not one channel-last/first mask)."""
    if not isinstance(items, (np.ndarray, torch.Tensor)):
        return False
    if kind == "image" or items.ndim != 3:
        return items.ndim == 4
    return items.shape[-1] not in (1, 3) and items.shape[0] != 1


def to_list(items: Any, kind: str) -> list:
    """One item, a stack or a list of items as a list; `None` as an empty one."""
    if items is None:
        return []
    if isinstance(items, (list, tuple)) or _is_stack(items, kind):
        return [item for item in items if item is not None]
    return [items]


def split_rows(items: Any, counts: list[int], kind: str, marker: str) -> list[list]:
    """Deal images or masks out to the rows of text that hold their markers.

    Args:
        items: `None`, one item, a flat list in the order of the markers, or one list per row.
        counts: how many markers each of the B rows holds.

    Raises:
        ValueError: a row has more or fewer markers than items. Text that smuggles a marker in ends here, too.
    """
    hint = f"Text must hold one {marker} per {kind}; user text must hold none of its own."
    nested = isinstance(items, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in items)
    if nested:
        rows = [to_list(row, kind) for row in items]
        if len(rows) != len(counts):
            raise ValueError(f"got {kind}s for {len(rows)} rows, but {len(counts)} rows of text")
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if len(row) != count:
                raise ValueError(f"row {index} of the text holds {count} {marker}, but {len(row)} {kind}s came. {hint}")
        return rows
    flat = to_list(items, kind)
    if len(flat) != sum(counts):
        raise ValueError(f"the text holds {sum(counts)} {marker}, but {len(flat)} {kind}s came. {hint}")
    remaining = iter(flat)
    return [[next(remaining) for _ in range(count)] for count in counts]
