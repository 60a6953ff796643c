"""Questions answered in words: names, yes or no, numbers, places, boxes as text and lists of things."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .accumulator import Accumulator, Record, by_kind, exact_mean
from .answers import box_iou

NOT_ASKED = -1.0  # the IoU of what is no box question, the F1 of what is no list
BOX = re.compile(r"\[\s*(\d+(?:\.\d+)?)" + r"\s*,\s*(\d+(?:\.\d+)?)" * 3 + r"\s*\]")
FIRST_THING = re.compile(r"[.,;:!?\n]|\b(?:and|or)\b")
BETWEEN_THINGS = re.compile(r"[.,;\n]|\band\b")
ARTICLE = re.compile(r"^(?:a pair of|an?|some|the)\s+")


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """The first "[left, top, right, bottom]" of a text; None if there is none, or it has no area."""
    found = BOX.search(text)
    if found is None:
        return None
    left, top, right, bottom = (float(number) for number in found.groups())
    return (left, top, right, bottom) if right > left and bottom > top else None


def parse_list(text: str) -> list[str]:
    """The things that a text lists, lower-case and without articles: "A mug, an egg." -> ["mug", "egg"]."""
    parts = (" ".join(part.split()) for part in BETWEEN_THINGS.split(text.lower()))
    return [ARTICLE.sub("", part) for part in parts if part]


def names_one_of(text: str, accepted: Sequence[str]) -> bool:
    """Whether one of the words stands, as a whole word, in the first thing that a text says.

    What follows the first comma, full stop, "and" or "or" does not count, so that guessing many things wins nothing.
    """
    first = FIRST_THING.split(text.strip().lower())[0]
    return any(re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", first) for word in accepted)


def _f1(one: Sequence[str], other: Sequence[str]) -> float:
    shared = (Counter(one) & Counter(other)).total()
    return 2 * shared / (len(one) + len(other)) if one or other else 1.0


class VqaAccuracy(Accumulator):
    """Accuracy of answers in words, by the rule of each kind of question.

    - "box": right if the first "[left, top, right, bottom]" has an IoU with the true one of at least `threshold`.
    - "list": right if it lists the same things in the same order; F1 counts them without the order.
    - any other kind: right if the first thing that the answer says has one of the accepted words (`names_one_of`).

    An answer with a mask, without words, or without a box where one is asked for, is wrong and counted in `invalid`.
    """

    columns = ("right", "valid", "iou", "f1", "kind")

    def __init__(self, threshold: float = 0.5) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold lies in (0, 1], not {threshold}")
        super().__init__(threshold=threshold)
        self.threshold = threshold

    def add(
        self,
        prediction: str,
        truth: str,
        kind: str = "",
        accepted: Sequence[str] = (),
        drawn: bool = False,
        sample_id: str | int | None = None,
    ) -> float:
        """Counts one answer.

        Args:
            truth: the right answer; for a box, "[left, top, right, bottom]" in the unit that is asked for.
            accepted: words any of which makes it right; of boxes and lists there are none.
            drawn: a mask was drawn.

        Returns:
            the IoU of a box, the F1 of a list, else 1.0 if it is right and 0.0 if not.

        Raises:
            ValueError: the truth of a box question is no box, or other questions have no accepted words.
        """
        valid, iou, f1 = bool(prediction.strip()) and not drawn, NOT_ASKED, NOT_ASKED
        if kind == "box":
            expected, found = parse_box(truth), parse_box(prediction)
            if expected is None:
                raise ValueError(f"the truth {truth!r} is no box [left, top, right, bottom] with an area")
            valid = valid and found is not None
            iou = box_iou(found, expected) if valid and found else 0.0
            right = iou >= self.threshold
        elif kind == "list":
            things, told = parse_list(truth), parse_list(prediction)
            f1 = _f1(things, told) if valid else 0.0
            right = valid and things == told
        elif accepted:
            right = valid and names_one_of(prediction, accepted)
        else:
            raise ValueError(f"a question of kind {kind!r} needs accepted words")
        record = (right, valid, iou, f1, kind)
        self._store(record, sample_id)
        return self._value(record)

    def _value(self, record: Record) -> float:
        right, _, iou, f1, _ = record
        return iou if iou != NOT_ASKED else f1 if f1 != NOT_ASKED else float(right)

    def _measure(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        """`accuracy`, `mean_iou` of boxes, `f1` of lists, `invalid`, `count`, and the first three for every kind."""
        invalid = int(np.count_nonzero(~table["valid"]))
        return self._rates(table) | {"invalid": invalid, "count": len(table["right"])} | by_kind(table, self._rates)

    def _rates(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        found = {"accuracy": int(np.count_nonzero(table["right"])) / len(table["right"])}
        for name, column in (("mean_iou", "iou"), ("f1", "f1")):
            asked = table[column][table[column] != NOT_ASKED]
            if len(asked):
                found[name] = exact_mean(asked)
        return found
