"""Masks as the metrics need them: one pair of bool arrays of one size, and its counts of pixels."""

from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from processing.mask_inputs import load_mask


class Overlap(NamedTuple):
    """Counts of pixels of a predicted and a true mask."""

    intersection: int
    union: int
    predicted: int
    target: int

    @property
    def iou(self) -> float:
        """Intersection over union, exactly divided; 1 where both masks are empty."""
        return iou_of(self.intersection, self.union)


def iou_of(intersection: int, union: int) -> float:
    """The field's convention for samples: nothing predicted where nothing is counts 1."""
    return intersection / union if union else 1.0


def load_pair(prediction: Any, truth: Any, ignore: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Both masks as bool (H, W), false where `ignore` is true.

    Args:
        prediction: whatever `load_mask` takes; None (nothing was drawn) is an empty mask.
        truth, ignore: the same, of one size.

    Raises:
        ValueError: sizes differ, or no mask.
    """
    truth = load_mask(truth)
    prediction = np.zeros_like(truth) if prediction is None else load_mask(prediction)
    _check_size("prediction", prediction, truth)
    if ignore is not None:
        ignore = load_mask(ignore)
        _check_size("ignore mask", ignore, truth)
        prediction, truth = prediction & ~ignore, truth & ~ignore
    return prediction, truth


def _check_size(name: str, mask: np.ndarray, truth: np.ndarray) -> None:
    if mask.shape != truth.shape:
        raise ValueError(f"the {name} is {mask.shape}, the truth {truth.shape}: resize the {name} to the truth's size")


def count_overlap(prediction: Any, truth: Any, ignore: Any = None) -> Overlap:
    """Counts of two masks; see `load_pair` for what they may be.

    RLEs are decoded, which finds broken ones: pycocotools' `area` and `merge` give numbers of them, or never return.
    """
    prediction, truth = load_pair(prediction, truth, ignore)
    predicted, target = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    shared = int(np.count_nonzero(prediction & truth)) if predicted and target else 0
    return Overlap(shared, predicted + target - shared, predicted, target)


def to_rle(mask: Any) -> dict[str, Any]:
    """Any mask as COCO RLE that JSON takes: `{"size": [H, W], "counts": str}`. ValueError if it is no mask."""
    encoded = coco_mask.encode(np.asfortranarray(load_mask(mask), dtype=np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}
