"""Answers in words: how each kind is read, cases worked by hand, and answers that are none."""

import json

import pytest

from trl_recipes.metrics import VqaAccuracy, bootstrap
from trl_recipes.metrics.vqa import names_one_of, parse_box, parse_list


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("A cow.", True),
        ("cow", True),
        ("It is a COW on the left.", True),
        ("a dairy cow", True),
        ("The bull, I think.", True),
        ("A cowboy.", False),  # whole words count
        ("A sea-cow.", True),
        ("A dog.", False),
        ("A dog, a cow, a horse.", False),  # only the first thing counts
        ("A dog and a cow.", False),
        ("A dog or a cow", False),
        ("", False),
        (" .", False),
    ],
)
def test_names(text, right):
    assert names_one_of(text, ("bull", "cow")) is right


@pytest.mark.parametrize(("text", "right"), [("2.", True), ("12", False), ("Two.", True), ("twofold", False)])
def test_numbers(text, right):
    assert names_one_of(text, ("two", "2")) is right


def test_names_are_no_patterns():
    assert names_one_of("A t.v set.", ("t",)) and not names_one_of("A cat", ("c.t",))


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[12, 40, 55, 80]", (12, 40, 55, 80)),
        ("The box is [ 1,2 , 3,4.5 ].", (1, 2, 3, 4.5)),
        ("[1, 2, 3, 4] or [5, 6, 7, 8]", (1, 2, 3, 4)),
        ("12, 40, 55, 80", None),
        ("[12, 40, 55]", None),
        ("[1, 2, 3, 4, 5]", None),
        ("[55, 40, 12, 80]", None),
        ("[12, 40, 12, 80]", None),
        ("[a, 2, 3, 4]", None),
        ("", None),
    ],
)
def test_boxes(text, box):
    assert parse_box(text) == box


@pytest.mark.parametrize(
    ("text", "things"),
    [
        ("A mug, an egg, some bread.", ["mug", "egg", "bread"]),
        ("a pair of scissors, the earth and a  red mug", ["scissors", "earth", "red mug"]),
        ("An anvil.", ["anvil"]),
        (" , .", []),
    ],
)
def test_lists(text, things):
    assert parse_list(text) == things


def test_numbers_by_hand():
    metrics = VqaAccuracy()
    values = [
        metrics.add("A cow.", "A bull.", "what", ("bull", "cow")),
        metrics.add("A cow.", "A bull.", "what", ("bull", "cow"), drawn=True),  # words, but also a mask
        metrics.add("[0, 0, 10, 10]", "[0, 0, 10, 20]", "box"),
        metrics.add("[0, 0, 10, 10]", "[0, 0, 10, 21]", "box"),
        metrics.add("On the left", "[0, 0, 10, 20]", "box"),
        metrics.add("A mug, a mug, an egg.", "A mug, an egg.", "list"),
        metrics.add("A mug, an egg", "A mug, an egg.", "list"),
        metrics.add("An egg, a mug", "A mug, an egg.", "list"),  # all things, but not in this order
        metrics.add(" ", "A mug, an egg.", "list"),
    ]
    assert values == [1, 0, 0.5, 10 / 21, 0, 0.8, 1, 1, 0]
    expected = {
        "accuracy": 3 / 9,
        "mean_iou": pytest.approx((0.5 + 10 / 21) / 3),
        "f1": pytest.approx(2.8 / 4),
        "invalid": 3,
        "count": 9,
        "accuracy_what": 1 / 2,
        "accuracy_box": 1 / 3,
        "mean_iou_box": pytest.approx((0.5 + 10 / 21) / 3),
        "accuracy_list": 1 / 4,
        "f1_list": pytest.approx(2.8 / 4),
    }
    assert metrics.compute() == expected


def test_parts_of_several_processes_give_the_same():
    whole, parts = VqaAccuracy(), [VqaAccuracy(), VqaAccuracy()]
    for number in range(12):
        text = f"[0, 0, {number + 1}, 9]"
        for metrics in (whole, parts[number % 2]):
            metrics.add(text, "[0, 0, 7, 9]", "box", sample_id=f"{number}-box")
            metrics.add("No." if number % 3 else "Yes.", "No.", "yes_no", ("no", "not"), sample_id=f"{number}-no")
    merged = VqaAccuracy().merge(json.loads(json.dumps(parts[1].state()))).merge(parts[0])
    assert merged.compute() == whole.compute() and merged.values() == {k: merged.values()[k] for k in whole.values()}
    low, high = bootstrap(whole, 50)["accuracy_yes_no"]
    assert low < 8 / 12 < high


def test_a_truth_that_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="no box .left, top, right, bottom. with an area"):
        VqaAccuracy().add("[1, 2, 3, 4]", "[3, 3, 3, 4]", "box")
    with pytest.raises(ValueError, match="kind 'what' needs accepted words"):
        VqaAccuracy().add("A cow.", "A cow.", "what")
    with pytest.raises(ValueError, match="threshold"):
        VqaAccuracy(0)
