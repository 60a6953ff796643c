"""MVTec AD: `<object>/test/<defect>/*.png` with masks in `<object>/ground_truth/<defect>/*_mask.png`."""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .samples import Sample, Samples, open_mask, open_rgb
from .task import MissingData, Source


def read(source: Source) -> Samples:
    """One sample for each test image. In a `good` one there is nothing to segment; the kind is the object."""
    samples = []
    for path in source.files[0]:
        kind, defect = path.parts[-4], path.parts[-2]
        truth = path.parents[2] / "ground_truth" / defect / f"{path.stem}_mask.png"
        if defect != "good" and not truth.is_file():
            raise MissingData(f"{truth} is missing, the mask of {path}: unpack the archive once more")
        name = f"{kind}/{defect}/{path.stem}"
        samples.append(
            Sample(
                id=name,
                text=source.options["phrase"].replace("{object}", kind.replace("_", " ")),
                load_image=partial(open_rgb, path),
                load_mask=partial(_nothing, path) if defect == "good" else partial(open_mask, truth),
                kind=kind,
                group=name,
            )
        )
    return Samples.of(samples)


def _nothing(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.zeros(image.size[::-1], bool)
