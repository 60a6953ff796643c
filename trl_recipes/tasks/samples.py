"""What every task is made of: samples with an id, an image, a text and a truth, loaded only when they are looked at."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from processing.mask_inputs import load_mask


@dataclass(frozen=True)
class Sample:
    """One question about one image, and its truth.

    Attributes:
        id: unique in its task; results are stored under it and computed in its order.
        text: what stands for `{text}` in the task's prompt.
        load_image: the image, RGB, its pixels as the annotation counts them (EXIF rotation is not applied).
        load_mask: the true mask, bool (H, W) or COCO RLE, of the size of the image.
        load_ignore: where neither truth nor prediction counts, bool (H, W).
        load_labels: the true label map, int (H, W), of a closed-vocabulary task.
        load_prompt: a picture that is part of the question (a point, a scribble), shown as a second image.
        box: true box (x0, y0, x1, y1) in pixels.
        answer: true answer in words.
        accepted: words any of which makes an answer in words right, where the task's metric reads them.
        kind: row of the table of results that the sample counts in, too.
        group: the image; samples of one image are drawn together for confidence intervals.
        label: class index that is asked for, of a closed-vocabulary task.
    """

    id: str
    text: str
    load_image: Callable[[], Image.Image]
    load_mask: Callable[[], Any] | None = None
    load_ignore: Callable[[], np.ndarray] | None = None
    load_labels: Callable[[], np.ndarray] | None = None
    load_prompt: Callable[[], Image.Image] | None = None
    box: tuple[float, float, float, float] | None = None
    answer: str | None = None
    accepted: tuple[str, ...] = ()
    kind: str = ""
    group: str = ""
    label: int | None = None


class Samples(Sequence[Sample]):
    """Samples in the order of their ids, made when they are asked for.

    Args:
        ids: of all samples, in any order.
        make: the sample of a place in `ids`.

    Raises:
        ValueError: an id is there twice.
    """

    def __init__(self, ids: Sequence[str], make: Callable[[int], Sample]) -> None:
        self._order = sorted(range(len(ids)), key=ids.__getitem__)
        self._make = make
        self.ids = [ids[place] for place in self._order]
        twice = next((a for a, b in zip(self.ids, self.ids[1:], strict=False) if a == b), None)
        if twice is not None:
            raise ValueError(f"the sample id {twice!r} is there twice; every sample needs its own")

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "Samples":
        known = list(samples)
        return cls([sample.id for sample in known], known.__getitem__)

    def first(self, count: int) -> "Samples":
        """The first `count` by id."""
        chosen = self._order[:count]
        return Samples(self.ids[:count], lambda place: self._make(chosen[place]))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # slices are `first`
        return self._make(self._order[index])


def open_rgb(source: str | Path | bytes) -> Image.Image:
    """A picture as its annotators saw its pixels: RGB, not turned by EXIF.

    Raises:
        ValueError: there is no such picture, or it cannot be read.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            # by way of an array: nothing that reads the picture later finds an EXIF rotation to apply
            return Image.fromarray(np.asarray(image.convert("RGB")))
    except OSError as error:
        name = "an image that is stored in the data set" if isinstance(source, bytes) else source
        raise ValueError(f"cannot read the image {name}: {error}") from error


def open_labels(path: str | Path) -> np.ndarray:
    """A label map (H, W) of whole numbers, from a one-channel picture (PNG of 8 or 16 bits, TIFF).

    Raises:
        ValueError: there is no such picture, or it has several channels.
    """
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except OSError as error:
        raise ValueError(f"cannot read the label map {path}: {error}") from error
    if labels.ndim != 2:
        raise ValueError(f"{path} is no label map: it has the shape {labels.shape}, not (H, W)")
    return labels.astype(np.int64)


def open_mask(path: str | Path) -> np.ndarray:
    """A mask picture as bool (H, W), as `load_mask` reads it (0 and 1, 0 and 255). Antialiased edges are thresholded at
    half of white. EXIF rotation is not applied, as with images.

    Raises:
        ValueError: there is no such picture, or it is neither black and white nor has greys above half of white.
    """
    try:
        with Image.open(path) as image:
            image.getexif().pop(ExifTags.Base.Orientation, None)
            grey = np.asarray(image.convert("L"))
            return load_mask(image)
    except OSError as error:
        raise ValueError(f"cannot read the mask {path}: {error}") from error
    except ValueError as error:
        if grey.max() > 127:
            return grey > 127
        raise ValueError(f"{path}: {error}") from error


def segmentation_rle(segmentations: Sequence[Any], height: int, width: int) -> dict[str, Any]:
    """The union of COCO segmentations, each polygons `[[x, y, ...], ...]` or RLE (compressed or not), as one RLE.

    pycocotools draws the polygons, as in COCO. Of none, an empty mask. Polygons of fewer than three points are nothing.

    Raises:
        ValueError: a segmentation is neither, or an RLE has another size.
    """
    runs: list[Any] = []
    for segmentation in segmentations:
        if isinstance(segmentation, list):
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
            runs += coco_mask.frPyObjects(polygons, height, width) if polygons else []
        elif isinstance(segmentation, dict) and tuple(segmentation["size"]) == (height, width):
            counts = segmentation["counts"]
            whole = coco_mask.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation
            runs.append(whole)
        else:
            raise ValueError(f"a segmentation must be polygons or RLE of {height}x{width}, not {segmentation!r:.100}")
    if not runs:
        return coco_mask.encode(np.zeros((height, width), np.uint8, order="F"))
    return coco_mask.merge(runs)


def prompt_picture(rle: dict[str, Any]) -> Image.Image:
    """A prompt mask as the black and white picture that the model is shown, RGB."""
    return Image.fromarray(load_mask(rle).astype(np.uint8) * 255).convert("RGB")
