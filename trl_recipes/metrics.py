"""Segmentation metrics over a set of predictions: gIoU, cIoU, no-target accuracy."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class SegmentationMetrics:
    """Sums over (prediction, truth) pairs of bool masks (H, W), with the rules of the field:

    `gIoU` is the mean IoU per sample; an empty truth counts 1 if nothing was predicted and 0 otherwise. `cIoU` is the
    sum of intersections over the sum of unions. `N-acc` is the share of no-target samples answered with no mask,
    `T-acc` the share of samples with a target answered with one (gRefCOCO).
    """

    ious: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    intersection: int = 0
    union: int = 0
    no_target: list[bool] = field(default_factory=list)
    target: list[bool] = field(default_factory=list)

    def add(self, prediction: np.ndarray | None, truth: np.ndarray, kind: str = "") -> float:
        """Counts one sample and returns its IoU. `prediction` None: no mask was drawn, an empty mask."""
        predicted = np.zeros_like(truth) if prediction is None or not prediction.any() else prediction
        drawn = bool(predicted.any())
        if predicted.shape != truth.shape:
            raise ValueError(f"the prediction is {predicted.shape}, the truth {truth.shape}: resize the prediction")
        intersection, union = int((predicted & truth).sum()), int((predicted | truth).sum())
        iou = 1.0 if union == 0 else intersection / union
        self.ious.append(iou)
        self.kinds.append(kind)
        self.intersection += intersection
        self.union += union
        (self.target if truth.any() else self.no_target).append(drawn if truth.any() else not drawn)
        return iou

    def compute(self) -> dict[str, float]:
        """`giou`, `ciou`, `n_acc`, `t_acc`, `count`, and `giou_<kind>` for every kind."""
        if not self.ious:
            raise ValueError("no sample was added")
        result = {
            "giou": float(np.mean(self.ious)),
            "ciou": self.intersection / self.union if self.union else 1.0,
            "count": len(self.ious),
        }
        if self.no_target:
            result["n_acc"] = float(np.mean(self.no_target))
        if self.target:
            result["t_acc"] = float(np.mean(self.target))
        by_kind = defaultdict(list)
        for kind, iou in zip(self.kinds, self.ious, strict=True):
            by_kind[kind].append(iou)
        return result | {f"giou_{kind}": float(np.mean(values)) for kind, values in sorted(by_kind.items()) if kind}


def best_constant_mask(masks: Iterable[np.ndarray], side: int = 64) -> tuple[np.ndarray, float]:
    """The one mask (side, side) that, given as every answer, has about the best gIoU, and that gIoU.

    Tried are discs and rectangles round the centre of all sizes, the empty mask and the full one.
    """
    truths = np.stack([_shrink(mask, side) for mask in masks]).reshape(-1, side * side)
    y, x = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    candidates = [np.zeros((side, side), bool), np.ones((side, side), bool)]
    candidates += [np.hypot(x, y) < r for r in np.linspace(0.05, 0.7, 27)]
    candidates += [(abs(x) < a) & (abs(y) < b) for a in np.linspace(0.1, 0.5, 9) for b in np.linspace(0.1, 0.5, 9)]
    flat = np.stack(candidates).reshape(len(candidates), -1)
    intersection = flat.astype(np.float32) @ truths.T.astype(np.float32)
    union = flat.sum(1)[:, None] + truths.sum(1)[None] - intersection
    gious = np.where(union == 0, 1.0, intersection / np.maximum(union, 1)).mean(1)
    best = int(gious.argmax())
    return candidates[best], float(gious[best])


def _shrink(mask: np.ndarray, side: int) -> np.ndarray:
    """(H, W) to (side, side): the pixels at the centres of the cells."""
    rows, columns = (((np.arange(side) + 0.5) * length / side).astype(int) for length in mask.shape)
    return mask[rows][:, columns]
