"""Calibration of mask scores: bins and areas worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_recipes.metrics import MaskCalibration
from trl_recipes.metrics.calibration import auroc


def test_two_bins_by_hand():
    metrics = MaskCalibration(bins=2)
    for score, iou in [(0.2, 0.6), (0.4, 0.1), (0.5, 0.5), (1.0, 0.9)]:  # 0.5 and 1.0 lie in the upper bin
        metrics.add(score, iou)
    lower, upper = metrics.reliability()
    assert lower == {"low": 0.0, "high": 0.5, "count": 2, "score": pytest.approx(0.3), "correct": 0.5, "iou": 0.35}
    assert upper == {"low": 0.5, "high": 1.0, "count": 2, "score": 0.75, "correct": 1.0, "iou": 0.7}
    assert metrics.compute() == {
        "ece": pytest.approx((2 * 0.2 + 2 * 0.25) / 4),
        "ece_iou": pytest.approx((2 * 0.05 + 2 * 0.05) / 4),
        "correct": 3 / 4,
        "count": 4,
        "auroc": 2 / 3,  # the wrong one (0.4) lies below two of three right ones
    }


def test_scores_that_are_true_have_no_error():
    metrics = MaskCalibration(bins=10)
    for score in np.linspace(0, 1, 41):
        metrics.add(score, score)
    assert metrics.compute()["ece_iou"] == pytest.approx(0, abs=1e-15)
    assert metrics.compute()["auroc"] == 1.0


def test_ties_count_half_and_one_class_has_no_area():
    assert auroc(np.array([0.5, 0.5]), np.array([True, False])) == 0.5
    assert auroc(np.array([0.1, 0.9]), np.array([True, True])) is None
    metrics = MaskCalibration()
    metrics.add(0.3, 0.9)
    assert "auroc" not in metrics.compute()


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2))
def test_the_area_is_a_share_of_pairs(rows):
    scores, right = np.array([s for s, _ in rows]), np.array([r for _, r in rows])
    above = [np.sign(a - b) / 2 + 0.5 for a in scores[right] for b in scores[~right]]
    assert auroc(scores, right) == (pytest.approx(np.mean(above), abs=1e-12) if above else None)


@pytest.mark.parametrize("pair", [(1.1, 0.5), (0.5, -0.1), (float("nan"), 0.5)])
def test_values_outside_are_refused(pair):
    with pytest.raises(ValueError, match="between 0 and 1"):
        MaskCalibration().add(*pair)
