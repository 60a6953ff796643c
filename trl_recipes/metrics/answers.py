"""Boxes and yes/no answers: REC acc@0.5 and POPE."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .accumulator import Accumulator, Record, by_kind, exact_mean

Box = Sequence[float]


def box_of_mask(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """The tightest box (x1, y1, x2, y2) round a bool mask (H, W), x2 and y2 one past the last pixel; None if empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else None


def box_iou(one: Box, other: Box) -> float:
    """IoU of two boxes (x1, y1, x2, y2) in continuous coordinates; a box without area has IoU 0 with all."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return min(1.0, shared / (sum(areas) - shared))


class BoxAccuracy(Accumulator):
    """Referring expression comprehension: the share of boxes whose IoU with the truth is at least `threshold`.

    No box, or one that is no box (not four finite numbers, no area), is a wrong answer and is counted in `invalid`.

    Args:
        box_format: "xyxy" (two corners) or "xywh" (corner and size, as in COCO), of predictions and truths alike.
    """

    columns = ("iou", "valid", "kind")

    def __init__(self, threshold: float = 0.5, box_format: Literal["xyxy", "xywh"] = "xyxy") -> None:
        if box_format not in ("xyxy", "xywh") or not 0 < threshold <= 1:
            raise ValueError(f"box_format is xyxy or xywh, threshold in (0, 1]; got {box_format!r} and {threshold}")
        super().__init__(threshold=threshold, box_format=box_format)
        self.threshold, self.box_format = threshold, box_format

    def add(self, prediction: Box | None, truth: Box, kind: str = "", sample_id: str | int | None = None) -> float:
        """Counts one box and returns its IoU. ValueError if the truth is no box."""
        expected, found = self._corners(truth), None if prediction is None else self._corners(prediction)
        if expected is None:
            raise ValueError(f"the truth {truth!r} is no {self.box_format} box with an area")
        record = (box_iou(found, expected) if found else 0.0, found is not None, kind)
        self._store(record, sample_id)
        return self._value(record)

    def _corners(self, box: Box) -> tuple[float, float, float, float] | None:
        try:
            values = [float(value) for value in box]
        except (TypeError, ValueError):
            return None
        if len(values) != 4 or not np.isfinite(values).all():
            return None
        x1, y1, x2, y2 = values
        if self.box_format == "xywh":
            x2, y2 = x1 + x2, y1 + y2
        return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None

    def _value(self, record: Record) -> float:
        return record[0]

    def _measure(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        """`acc@<threshold>`, `mean_iou`, `invalid`, `count`, and the first two for every kind."""
        invalid = int(np.count_nonzero(~table["valid"]))
        return self._means(table) | {"invalid": invalid, "count": len(table["iou"])} | by_kind(table, self._means)

    def _means(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        right = int(np.count_nonzero(table["iou"] >= self.threshold))
        return {f"acc@{self.threshold:g}": right / len(table["iou"]), "mean_iou": exact_mean(table["iou"])}


def says_yes(answer: str) -> bool:
    """POPE's rule: "no" if the first sentence has one of the words No, no and not, otherwise "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


class Pope(Accumulator):
    """Polling for objects that are not there (Li et al., EMNLP 2023): is the answer "yes" where it should be?

    "yes" is the positive class. The rule of the benchmark's own code reads the answer (`says_yes`): whatever does not
    say no counts as yes. `unparsed` counts answers with neither word, so that a model that never answers is found out.
    Give the split (random, popular, adversarial) as `kind`: published numbers are per split.
    """

    columns = ("yes", "expected", "parsed", "kind")

    def add(self, prediction: str, truth: str | bool, kind: str = "", sample_id: str | int | None = None) -> float:
        """Counts one answer; `truth` is "yes", "no" or a bool. Returns 1.0 if it is right, else 0.0."""
        label = {True: "yes", False: "no"}.get(truth, truth) if isinstance(truth, bool) else truth.strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"the truth is 'yes' or 'no', not {truth!r}")
        yes = says_yes(prediction)
        parsed = not yes or "yes" in "".join(c if c.isalpha() else " " for c in prediction.lower()).split()
        record = (yes, label == "yes", parsed, kind)
        self._store(record, sample_id)
        return self._value(record)

    def _value(self, record: Record) -> float:
        return float(record[0] == record[1])

    def _measure(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        """`accuracy`, `precision`, `recall`, `f1`, `yes_ratio`, all of them for every kind, `unparsed` and `count`.

        A precision, recall or F1 of nothing (no yes said, none expected) is 0.
        """
        unparsed = int(np.count_nonzero(~table["parsed"]))
        return self._rates(table) | {"unparsed": unparsed, "count": len(table["yes"])} | by_kind(table, self._rates)

    def _rates(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        said, expected = table["yes"], table["expected"]
        hits, said_n, expected_n = (int(np.count_nonzero(one)) for one in (said & expected, said, expected))
        return {
            "accuracy": int(np.count_nonzero(said == expected)) / len(said),
            "precision": hits / said_n if said_n else 0.0,
            "recall": hits / expected_n if expected_n else 0.0,
            "f1": 2 * hits / (said_n + expected_n) if said_n + expected_n else 0.0,
            "yes_ratio": said_n / len(said),
        }
