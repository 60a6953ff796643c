"""ReasonSeg: a photograph `<name>.jpg` and `<name>.json` (labelme) with questions and polygons."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .polygons import paint_polygon
from .samples import Sample, Samples, open_rgb
from .task import Source

TARGET, IGNORE = 1, 255


def read(source: Source) -> Samples:
    """One sample for each file: its first sentence. The kind tells sentences ("long") from phrases ("short")."""
    samples = []
    for path in source.files[0]:
        content = _labelme(path)
        load = partial(_label_map, path, content["shapes"])
        samples.append(
            Sample(
                id=path.stem,
                text=content["text"][0],
                load_image=partial(open_rgb, path.with_suffix(".jpg")),
                load_mask=partial(_pixels, load, TARGET),
                load_ignore=partial(_pixels, load, IGNORE),
                kind="long" if content["is_sentence"] else "short",
                group=path.stem,
            )
        )
    return Samples.of(samples)


def _pixels(load: Callable[[], np.ndarray], value: int) -> np.ndarray:
    return load() == value


def _labelme(path: Path) -> dict[str, Any]:
    """A file's content; some files of the data set are not UTF-8 but Windows' Latin 1.

    Raises:
        ValueError: not JSON, or a field is missing.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("cp1252")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    missing = {"text", "is_sentence", "shapes"} - content.keys()
    if missing or not content["text"]:
        raise ValueError(f"{path}: the field {min(missing, default='text')!r} is missing or empty")
    return content


def _label_map(path: Path, shapes: list[dict[str, Any]]) -> np.ndarray:
    """(H, W) of 0, TARGET and IGNORE. Larger polygons are painted first, so that smaller ones lie on top.

    Corners are cut to whole pixels; polygons are painted as OpenCV does, with which the authors made the truth.
    """
    with Image.open(path.with_suffix(".jpg")) as image:
        width, height = image.size
    drawn = []
    for shape in shapes:
        if shape["label"].lower() == "flag":  # deprecated, without a meaning
            continue
        corners = [(int(x), int(y)) for x, y in shape["points"]]
        alone = np.zeros((height, width), np.uint8)
        paint_polygon(alone, corners, TARGET)
        drawn.append((int(alone.sum()), corners, IGNORE if "ignore" in shape["label"].lower() else TARGET))
    canvas = np.zeros((height, width), np.uint8)
    for _, corners, value in sorted(drawn, key=lambda one: -one[0]):
        paint_polygon(canvas, corners, value)
    return canvas
