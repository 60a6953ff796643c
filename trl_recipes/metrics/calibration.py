"""Whether the score of a mask says how good the mask is."""

import math

import numpy as np

from .accumulator import Accumulator, Record, exact_mean


class MaskCalibration(Accumulator):
    """Expected calibration error (ECE) of mask scores, and how well they tell good masks from bad ones (AUROC).

    A mask is right if its IoU is at least `threshold`. Scores are put into `bins` bins of equal width, [k/n, (k+1)/n),
    the last one closed. `ece` is the mean gap between a bin's mean score and its share of right masks, weighted by the
    bin's samples; `ece_iou` is the gap to the bin's mean IoU, for scores that estimate IoU itself. `auroc` is the
    chance that a right mask has a higher score than a wrong one, ties counting half.
    """

    columns = ("score", "iou")

    def __init__(self, bins: int = 15, threshold: float = 0.5) -> None:
        if bins < 1 or not 0 < threshold <= 1:
            raise ValueError(f"at least one bin and a threshold in (0, 1] are needed, not {bins} and {threshold}")
        super().__init__(bins=bins, threshold=threshold)
        self.bins, self.threshold = bins, threshold

    def add(self, score: float, iou: float, sample_id: str | int | None = None) -> float:
        """Counts one drawn mask, and returns its score minus its IoU. ValueError outside [0, 1] or for NaN."""
        record = (float(score), float(iou))
        if not all(0 <= value <= 1 for value in record):
            raise ValueError(f"scores and IoUs lie between 0 and 1, not {score} and {iou}")
        self._store(record, sample_id)
        return self._value(record)

    def _value(self, record: Record) -> float:
        return record[0] - record[1]

    def reliability(self) -> list[dict[str, float]]:
        """The non-empty bins of a reliability diagram: `low`, `high`, `count`, mean `score`, `correct` and `iou`."""
        return self._bins(self._table(self._records()))

    def _bins(self, table: dict[str, np.ndarray]) -> list[dict[str, float]]:
        scores, ious = table["score"], table["iou"]
        edges = np.arange(1, self.bins) / self.bins
        index = np.searchsorted(edges, scores, side="right")
        return [
            {
                "low": k / self.bins,
                "high": (k + 1) / self.bins,
                "count": int(rows.sum()),
                "score": exact_mean(scores[rows]),
                "correct": exact_mean((ious[rows] >= self.threshold).astype(float)),
                "iou": exact_mean(ious[rows]),
            }
            for k in range(self.bins)
            if (rows := index == k).any()
        ]

    def _measure(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        """`ece`, `ece_iou`, `correct` (the share of right masks), `count`, and `auroc` where both kinds occur."""
        right, count, found = table["iou"] >= self.threshold, len(table["iou"]), self._bins(table)
        result = {
            "ece": math.fsum(one["count"] * abs(one["score"] - one["correct"]) for one in found) / count,
            "ece_iou": math.fsum(one["count"] * abs(one["score"] - one["iou"]) for one in found) / count,
            "correct": int(np.count_nonzero(right)) / count,
            "count": count,
        }
        area = auroc(table["score"], right)
        return result if area is None else result | {"auroc": area}


def auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve of scores (N,) for bool labels (N,), from integer counts; None if a class is missing."""
    values, index = np.unique(scores, return_inverse=True)
    hits = np.bincount(index[positive], minlength=len(values))
    misses = np.bincount(index[~positive], minlength=len(values))
    if not hits.any() or not misses.any():
        return None
    below = np.cumsum(misses) - misses
    return int((hits * (2 * below + misses)).sum()) / (2 * int(hits.sum()) * int(misses.sum()))
