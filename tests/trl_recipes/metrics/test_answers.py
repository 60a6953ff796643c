"""REC acc@0.5 and POPE: cases worked by hand, and answers that are none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trl_recipes.metrics import BoxAccuracy, Pope, box_of_mask
from trl_recipes.metrics.answers import box_iou, says_yes

CORNER = st.floats(-50, 50)
BOX = st.tuples(CORNER, CORNER, CORNER, CORNER).map(lambda b: (*np.minimum(b[:2], b[2:]), *np.maximum(b[:2], b[2:])))


def test_half_is_enough():
    metrics = BoxAccuracy()
    assert metrics.add((0, 0, 2, 1), (0, 0, 4, 1)) == 0.5
    assert metrics.add((0, 0, 1.9, 1), (0, 0, 4, 1)) < 0.5
    assert metrics.compute()["acc@0.5"] == 0.5


@pytest.mark.parametrize("box", [None, (), (1, 2, 3), (0, 0, 0, 4), (3, 3, 1, 1), (0, 0, float("nan"), 2), "box", 7])
def test_an_answer_that_is_no_box_is_wrong_and_counted(box):
    metrics = BoxAccuracy()
    assert metrics.add(box, (0, 0, 2, 2), kind="person") == 0.0
    assert metrics.compute() == {
        "acc@0.5": 0.0,
        "mean_iou": 0.0,
        "invalid": 1,
        "count": 1,
        "acc@0.5_person": 0.0,
        "mean_iou_person": 0.0,
    }


def test_formats_of_boxes():
    corners, sizes = BoxAccuracy(), BoxAccuracy(box_format="xywh")
    assert corners.add((1, 1, 3, 4), (2, 1, 4, 4)) == sizes.add((1, 1, 2, 3), (2, 1, 2, 3)) == 1 / 3


def test_a_truth_that_is_no_box_is_refused():
    with pytest.raises(ValueError, match="no xyxy box"):
        BoxAccuracy().add((0, 0, 1, 1), (3, 3, 1, 1))
    with pytest.raises(ValueError, match="xyxy or xywh"):
        BoxAccuracy(box_format="cxcywh")


@given(BOX, BOX)
def test_box_iou_is_symmetric_and_a_share(one, other):
    assert 0 <= box_iou(one, other) == box_iou(other, one) <= 1


@given(arrays(bool, (5, 7)))
def test_the_box_of_a_mask_is_the_tightest(mask):
    box = box_of_mask(mask)
    if box is None:
        assert not mask.any()
    else:
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].sum() == mask.sum()
        assert all(one.any() for one in (mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]))


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("No, there is none.", False),
        ("There is not a dog. Yes.", False),
        ("Yes. There is no dog.", True),  # the first sentence counts
        ("", True),  # whatever does not say no
        ("Nothing", True),  # whole words count
        ("NO", True),  # the benchmark's own code knows No, no and not
        ("There isn't", True),
    ],
)
def test_the_rule_of_pope(answer, yes):
    assert says_yes(answer) is yes


def test_numbers_of_pope_by_hand():
    metrics = Pope()
    answers = [("Yes.", "yes"), ("Yes", "no"), ("No", "no"), ("no", True), ("perhaps", False)]
    assert [metrics.add(*pair, kind="random") for pair in answers] == [1, 0, 1, 0, 0]
    rates = {"accuracy": 2 / 5, "precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "yes_ratio": 3 / 5}
    assert metrics.compute() == {
        **rates,
        "unparsed": 1,
        "count": 5,
        **{f"{name}_random": value for name, value in rates.items()},
    }


def test_rates_of_nothing_are_zero():
    metrics = Pope()
    metrics.add("no", "no")
    result = metrics.compute()
    assert (result["precision"], result["recall"], result["f1"], result["accuracy"]) == (0, 0, 0, 1)


def test_a_truth_that_is_neither_is_refused():
    with pytest.raises(ValueError, match="'yes' or 'no', not 'maybe'"):
        Pope().add("yes", "maybe")
