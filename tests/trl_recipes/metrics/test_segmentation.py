"""Segmentation metrics against cases worked by hand, and properties that hold for any masks."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trl_recipes.metrics import SegmentationMetrics, best_constant_mask

MASK = arrays(bool, (3, 4))
PAIRS = st.lists(st.tuples(st.none() | MASK, MASK), min_size=1, max_size=6)
EMPTY = np.zeros((2, 5), bool)


def mask(text: str) -> np.ndarray:
    """Rows of `#` and `.`, separated by blanks."""
    return np.array([[character == "#" for character in row] for row in text.split()])


def measure(pairs, kinds=()) -> dict[str, float]:
    metrics = SegmentationMetrics()
    for index, (prediction, truth) in enumerate(pairs):
        metrics.add(prediction, truth, *kinds[index : index + 1])
    return metrics.compute()


def test_iou_of_overlapping_masks():
    metrics = SegmentationMetrics()
    assert metrics.add(mask("###.. ....."), mask(".#### .....")) == 2 / 5
    assert metrics.compute() == {"giou": 0.4, "ciou": 0.4, "count": 1, "t_acc": 1.0}


@pytest.mark.parametrize("nothing", [None, EMPTY])
def test_nothing_drawn_where_nothing_is_counts_as_right(nothing):
    assert measure([(nothing, EMPTY)]) == {"giou": 1.0, "ciou": 1.0, "count": 1, "n_acc": 1.0}


def test_one_pixel_where_nothing_is_counts_as_wrong_and_its_area_joins_the_union():
    wrong = (mask("###.. ....."), EMPTY)
    assert measure([wrong]) == {"giou": 0.0, "ciou": 0.0, "count": 1, "n_acc": 0.0}
    right = (mask("##### ....."), mask("##### ....."))
    assert measure([wrong, right])["ciou"] == 5 / (5 + 3)


@pytest.mark.parametrize("nothing", [None, EMPTY])
def test_a_target_that_is_not_drawn_stays_in_the_union(nothing):
    missed = (nothing, mask("##### ##..."))
    assert measure([missed]) == {"giou": 0.0, "ciou": 0.0, "count": 1, "t_acc": 0.0}
    right = (mask("###.. ....."), mask("###.. ....."))
    assert measure([missed, right])["ciou"] == 3 / (7 + 3)


def test_ciou_is_a_ratio_of_sums_and_giou_a_mean_of_ratios():
    small = (mask("#.... ....."), mask("##... ....."))  # 1 / 2
    large = (mask("##### ###.."), mask("##### ###.."))  # 8 / 8
    result = measure([small, large])
    assert result["giou"] == 3 / 4
    assert result["ciou"] == 9 / 10


def test_accuracies_ask_only_whether_something_was_drawn():
    something, target = mask("....# ....."), mask("#.... .....")
    pairs = [(None, EMPTY), (something, EMPTY), (None, EMPTY), (something, target), (None, target)]
    result = measure(pairs)
    assert (result["n_acc"], result["t_acc"]) == (2 / 3, 1 / 2)


@pytest.mark.parametrize("nothing", [None, EMPTY])
def test_a_set_of_all_no_target_cases(nothing):
    """Right, wrong, missed and hit, as ReLA counts them: 1 + 0 + 0 + 2/5 over four, 2 over 0 + 3 + 4 + 5 pixels."""
    pairs = [
        (nothing, EMPTY),
        (mask("###.. ....."), EMPTY),
        (nothing, mask("####. .....")),
        (mask("..### ....."), mask("...## ##...")),
    ]
    assert measure(pairs) == {
        "giou": (1 + 0 + 0 + 2 / 5) / 4,
        "ciou": 2 / (0 + 3 + 4 + 5),
        "count": 4,
        "n_acc": 1 / 2,
        "t_acc": 1 / 2,
    }


def test_precision_counts_samples_with_a_target_from_the_threshold_on():
    metrics = SegmentationMetrics(thresholds=(0.4, 0.5, 0.7))
    metrics.add(mask("###.. ....."), mask(".#### ....."))  # 2 / 5
    metrics.add(mask("##### ##..."), mask("##### #####"))  # 7 / 10, not less than 0.7
    metrics.add(None, EMPTY)  # has no target
    result = metrics.compute()
    assert (result["pr@0.4"], result["pr@0.5"], result["pr@0.7"]) == (1.0, 0.5, 0.5)


def test_without_targets_there_is_no_precision():
    metrics = SegmentationMetrics(thresholds=(0.5,))
    metrics.add(None, EMPTY)
    assert "pr@0.5" not in metrics.compute()


@pytest.mark.parametrize("thresholds", [(1.5,), (-0.1, 0.5), (50,)])
def test_thresholds_are_shares(thresholds):
    with pytest.raises(ValueError, match="between 0 and 1"):
        SegmentationMetrics(thresholds)


def test_ignored_pixels_count_neither_for_nor_against():
    ignore = mask("...## #####")
    metrics = SegmentationMetrics()
    assert metrics.add(mask("##.## #####"), mask("###.. ....."), ignore=ignore) == 2 / 3
    assert metrics.add(mask("...## #####"), EMPTY, ignore=ignore) == 1.0
    with pytest.raises(ValueError, match="resize the ignore mask"):
        metrics.add(EMPTY, EMPTY, ignore=np.ones((2, 2), bool))


def test_kinds_have_means_of_their_own():
    right, wrong = (mask("##"), mask("##")), (None, mask("##"))
    result = measure([right, wrong, wrong, right], kinds=["noun", "noun", "size", ""])
    assert {name: value for name, value in result.items() if name.startswith("giou_")} == {
        "giou_noun": 0.5,
        "giou_size": 0.0,
    }


@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    assert measure(shuffled) == measure(pairs)


@given(PAIRS)
def test_every_number_is_a_share_and_the_worst_case_is_the_union(pairs):
    result = measure(pairs)
    assert result.pop("count") == len(pairs)
    assert all(0 <= value <= 1 for value in result.values())
    overlap = any((one is not None and (one & truth).any()) for one, truth in pairs)
    pixels = any((one is not None and one.any()) or truth.any() for one, truth in pairs)
    assert (result["ciou"] > 0) == (overlap or not pixels)


@given(MASK, MASK)
def test_iou_is_symmetric_and_one_only_for_equal_masks(one, other):
    metrics = SegmentationMetrics()
    iou = metrics.add(one, other)
    assert iou == metrics.add(other, one)
    assert (iou == 1) == np.array_equal(one, other)


def test_a_prediction_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 5\).*resize"):
        SegmentationMetrics().add(np.ones((2, 2), bool), EMPTY)


def test_no_samples_are_no_result():
    with pytest.raises(ValueError, match="no sample"):
        SegmentationMetrics().compute()


@given(st.lists(arrays(bool, (3, 3)), min_size=1, max_size=5))
def test_the_best_constant_mask_scores_what_it_says_and_no_more_than_any_mask_can(truths):
    found, giou = best_constant_mask(truths, side=3)
    assert measure([(found, truth) for truth in truths])["giou"] == pytest.approx(giou)
    every = (np.reshape(bits, (3, 3)) for bits in product([False, True], repeat=9))
    scores = [np.mean([_iou(one, truth) for truth in truths]) for one in every]
    assert giou <= max(scores) + 1e-6
    assert giou >= np.mean([not truth.any() for truth in truths]) - 1e-6  # what the empty mask gets
    assert giou >= np.mean([truth.mean() for truth in truths]) - 1e-6  # and the full one


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return (one & other).sum() / union if union else 1.0


@pytest.mark.parametrize("size", [(64, 64), (96, 192), (100, 77), (240, 320)])
def test_the_best_constant_mask_finds_a_centred_disc_in_masks_of_any_size(size):
    y, x = ((np.indices(size).T + 0.5) / np.array(size) - 0.5).T
    disc = np.hypot(x, y) < 0.3
    found, giou = best_constant_mask([disc, disc, np.zeros(size, bool)])
    assert giou == pytest.approx(2 / 3, abs=0.01)
    assert found.mean() == pytest.approx(disc.mean(), abs=0.01)


def test_the_best_constant_mask_finds_a_centred_band():
    band = np.zeros((64, 64), bool)
    band[16:48] = True
    found, giou = best_constant_mask([band, band, band, ~band])
    assert np.array_equal(found, band) and giou == pytest.approx(3 / 4)


def test_the_best_constant_answer_to_mostly_nothing_is_nothing():
    found, giou = best_constant_mask([EMPTY, EMPTY, ~EMPTY])
    assert not found.any() and giou == pytest.approx(2 / 3)
