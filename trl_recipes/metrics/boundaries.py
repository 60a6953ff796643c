"""How well contours agree: boundary IoU and average Hausdorff distance."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .accumulator import Accumulator, Record, by_kind, exact_mean
from .masks import Overlap, count_overlap, iou_of, load_pair


def boundary_band(mask: np.ndarray, distance: int) -> np.ndarray:
    """The pixels of a bool mask (H, W) that lie within `distance` of a pixel outside it, counted as a king walks.

    What lies outside the picture is outside the mask, so a mask that is cut off has a boundary there.
    """
    band = mask.copy()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows):
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # outside of it there is nothing to erode
        band[box] &= ~_erode_rows(_erode_rows(mask[box].T, distance).T, distance)
    return band


def _erode_rows(mask: np.ndarray, distance: int) -> np.ndarray:
    """True where the pixel and its `distance` upper and lower neighbours are all true; (H, W), outside is false.

    The length of the run that is looked at doubles with every step.
    """
    height, width = mask.shape
    runs = np.zeros((height + 2 * distance, width), bool)
    runs[distance : distance + height] = mask
    length, wanted = 1, 2 * distance + 1
    while length < wanted:
        step = min(length, wanted - length)
        runs = runs[:-step] & runs[step:]
        length += step
    return runs


class BoundaryIoU(Accumulator):
    """IoU of the bands along the contours of prediction and truth, inside the masks, averaged over samples.

    (Cheng et al., Boundary IoU, CVPR 2021.) A band is what `dilation_ratio` times the diagonal of the picture, rounded
    and at least one pixel, reaches from outside; the picture's edge counts as outside. Both masks empty counts 1.
    """

    columns = ("intersection", "union", "kind")

    def __init__(self, dilation_ratio: float = 0.02) -> None:
        if not 0 < dilation_ratio < 1:
            raise ValueError(f"dilation_ratio is a share of the diagonal between 0 and 1, not {dilation_ratio}")
        super().__init__(dilation_ratio=dilation_ratio)
        self.dilation_ratio = dilation_ratio

    def add(self, prediction: Any, truth: Any, kind: str = "", sample_id: str | int | None = None) -> float:
        """Counts one sample and returns its boundary IoU; arguments as those of `SegmentationMetrics.add`."""
        prediction, truth = load_pair(prediction, truth)
        distance = max(1, round(self.dilation_ratio * float(np.hypot(*truth.shape))))
        found = count_overlap(boundary_band(prediction, distance), boundary_band(truth, distance))
        record = (found.intersection, found.union, kind)
        self._store(record, sample_id)
        return self._value(record)

    def _value(self, record: Record) -> float:
        return iou_of(record[0], record[1])

    def _measure(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        """`boundary_iou`, `count`, and `boundary_iou_<kind>` for every kind."""
        return self._mean(table) | {"count": len(table["union"])} | by_kind(table, self._mean)

    def _mean(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        pairs = zip(table["intersection"].tolist(), table["union"].tolist(), strict=True)
        return {"boundary_iou": exact_mean(iou_of(*pair) for pair in pairs)}


def contour(mask: np.ndarray) -> np.ndarray:
    """Rows and columns (N, 2) of the pixels of a bool mask (H, W) that have one of 4 neighbours outside it.

    The picture's edge counts as outside.
    """
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inner)


def directed_distances(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float] | None:
    """Mean distance in pixels from a contour to the nearest pixel of the other: prediction to truth, truth to it.

    None where a mask (bool, (H, W)) is empty: there is no contour.
    """
    try:
        from scipy.spatial import KDTree
    except ImportError as error:
        raise ImportError("average Hausdorff distances need scipy: pip install 'argenseg[eval]'") from error
    one, other = contour(prediction), contour(truth)
    if not len(one) or not len(other):
        return None
    fast = {"leafsize": 30, "balanced_tree": False}  # straight contours make balancing slow
    forward, backward = KDTree(other, **fast).query(one)[0], KDTree(one, **fast).query(other)[0]
    return exact_mean(forward), exact_mean(backward)


class AverageHausdorff(Accumulator):
    """Average Hausdorff distance (AHD) of contours and its mean under IoU thresholds (LlamaSeg, arXiv 2505.19422).

    `AHD(X, Y) = 1/2 (mean over x of the distance to the nearest y + mean over y of the distance to the nearest x)`
    over contour pixels (4-neighbourhood, the picture's edge counts as outside), Euclidean. `mahd@T` is the mean AHD of
    the samples whose mask IoU is above T, so every threshold has samples of its own: `count@T` says how many. `mahd`
    is the mean without a threshold. Where just one of the masks is empty there is no distance; such samples (IoU 0)
    are in no mean, and `undefined` counts them, as it counts those where both are empty.

    The paper leaves open what is fixed here: the contour, and that "normalised to 256 pixels" means distances times
    `side` / the longer side of the picture.

    Args:
        thresholds: the T of `mahd@T`.
        side: the side the distances are scaled to; None leaves pixels of the truth.
    """

    columns = ("intersection", "union", "forward", "backward", "kind")

    def __init__(self, thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9), side: int | None = 256) -> None:
        if not all(0 <= threshold < 1 for threshold in thresholds):
            raise ValueError(f"thresholds of IoU lie in [0, 1), not {list(thresholds)}")
        super().__init__(thresholds=list(thresholds), side=side)
        self.thresholds, self.side = tuple(thresholds), side

    def add(self, prediction: Any, truth: Any, kind: str = "", sample_id: str | int | None = None) -> float | None:
        """Counts one sample and returns its AHD, None where it has none; arguments as of `SegmentationMetrics.add`."""
        prediction, truth = load_pair(prediction, truth)
        found: Overlap = count_overlap(prediction, truth)
        distances = directed_distances(prediction, truth)
        scale = self.side / max(truth.shape) if self.side else 1.0
        forward, backward = (-1.0, -1.0) if distances is None else (one * scale for one in distances)
        record = (found.intersection, found.union, forward, backward, kind)
        self._store(record, sample_id)
        return self._value(record)

    def _value(self, record: Record) -> float | None:
        return None if record[2] < 0 else (record[2] + record[3]) / 2

    def _measure(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        """`mahd`, `mahd@<T>` and `count@<T>`, `undefined`, `count`; means over no samples are left out."""
        chosen = self._chosen(table)
        result: dict[str, float] = self._means(table)
        result |= {f"count@{t:g}": int(np.count_nonzero(chosen[f"mahd@{t:g}"])) for t in self.thresholds}
        result |= {"undefined": int(np.count_nonzero(~chosen["mahd"])), "count": len(chosen["mahd"])}
        return result | by_kind(table, self._means)

    def _means(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        distances = (table["forward"] + table["backward"]) / 2
        return {name: exact_mean(distances[rows]) for name, rows in self._chosen(table).items() if rows.any()}

    def _chosen(self, table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Which samples (N,) are in each mean."""
        defined = table["forward"] >= 0
        ious = table["intersection"] / np.maximum(table["union"], 1)
        return {"mahd": defined} | {f"mahd@{t:g}": defined & (ious > t) for t in self.thresholds}
