"""gIoU, cIoU, no-target accuracies and Pr@X of masks, and a baseline that looks at no image."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .accumulator import Accumulator, Record, by_kind, exact_mean
from .masks import count_overlap, iou_of


class SegmentationMetrics(Accumulator):
    """Sums over (prediction, truth) pairs of masks (H, W), with the rules of the field:

    `giou` is the mean IoU per sample; an empty truth counts 1 if nothing was predicted and 0 otherwise. `ciou` is the
    sum of intersections over the sum of unions, to which a wrong answer to an empty truth adds its area. `n_acc` is
    the share of no-target samples answered with no mask, `t_acc` the share of samples with a target answered with one
    (gRefCOCO). `pr@X` is the share of samples with a target whose IoU is at least X. Nothing is ever skipped: a
    missing prediction is an empty mask.

    Args:
        thresholds: the X of `pr@X`; none by default.
    """

    columns = ("intersection", "union", "predicted", "target", "kind")

    def __init__(self, thresholds: Sequence[float] = ()) -> None:
        if not all(0 <= threshold <= 1 for threshold in thresholds):
            raise ValueError(f"thresholds of IoU lie between 0 and 1, not {list(thresholds)}")
        super().__init__(thresholds=list(thresholds))
        self.thresholds = tuple(thresholds)

    def add(
        self, prediction: Any, truth: Any, kind: str = "", sample_id: str | int | None = None, ignore: Any = None
    ) -> float:
        """Counts one sample and returns its IoU.

        Args:
            prediction: a mask in any form of `load_mask`, of the truth's size; None: no mask was drawn, an empty mask.
            truth: a mask in any form.
            kind: a group with a `giou_<kind>` of its own.
            sample_id: see `Accumulator`.
            ignore: a mask of the pixels that count neither for nor against (ReasonSeg).

        Raises:
            ValueError: the sizes differ, or one of them is no mask.
        """
        record = (*count_overlap(prediction, truth, ignore), kind)
        self._store(record, sample_id)
        return self._value(record)

    def _value(self, record: Record) -> float:
        return iou_of(record[0], record[1])

    def _measure(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        """`giou`, `ciou`, `count`, `n_acc`, `t_acc`, `pr@<X>`, and `giou_<kind>` for every kind."""
        ious, union = _ious(table), int(table["union"].sum())
        targeted, drawn = table["target"] > 0, table["predicted"] > 0
        result = {
            "giou": exact_mean(ious),
            "ciou": int(table["intersection"].sum()) / union if union else 1.0,
            "count": len(ious),
        }
        if not targeted.all():
            result["n_acc"] = _share(~drawn[~targeted])
        if targeted.any():
            result["t_acc"] = _share(drawn[targeted])
            result |= {f"pr@{x:g}": _share(ious[targeted] >= x) for x in self.thresholds}
        return result | by_kind(table, lambda part: {"giou": exact_mean(_ious(part))})


def _ious(table: dict[str, np.ndarray]) -> np.ndarray:
    """IoU per sample (N,), from integer counts; 1 where the union is empty."""
    union = table["union"]
    return np.where(union == 0, 1.0, table["intersection"] / np.maximum(union, 1))


def _share(flags: np.ndarray) -> float:
    return int(np.count_nonzero(flags)) / len(flags)


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
