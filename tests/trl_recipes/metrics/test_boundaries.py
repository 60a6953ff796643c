"""Boundary IoU and average Hausdorff distance: cases worked by hand, and what holds for any masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trl_recipes.metrics import AverageHausdorff, BoundaryIoU
from trl_recipes.metrics.boundaries import boundary_band, contour

MASK = arrays(bool, (6, 7))
EMPTY = np.zeros((6, 7), bool)


def rectangle(rows: slice, columns: slice, size: tuple[int, int] = (20, 20)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[rows, columns] = True
    return mask


def test_the_band_of_a_square():
    square = rectangle(slice(4, 14), slice(4, 14))
    assert np.array_equal(boundary_band(square, 2), square & ~rectangle(slice(6, 12), slice(6, 12)))
    assert np.array_equal(boundary_band(square, 5), square)


def test_the_edge_of_the_picture_is_a_boundary():
    full = np.ones((5, 6), bool)
    assert np.array_equal(boundary_band(full, 1), ~rectangle(slice(1, 4), slice(1, 5), (5, 6)))
    assert len(contour(full)) == 2 * 5 + 2 * 4


def test_boundary_iou_by_hand():
    """The diagonal is 28.3, its fiftieth rounds to 1: rings of one pixel, of 36 pixels each."""
    square, moved = rectangle(slice(2, 12), slice(2, 12)), rectangle(slice(2, 12), slice(3, 13))
    shared = 9 + 9  # the top and the bottom row, without the ends
    assert BoundaryIoU().add(moved, square) == shared / (36 + 36 - shared)


@pytest.mark.parametrize(("prediction", "expected"), [(None, 1.0), (EMPTY, 1.0), (~EMPTY, 0.0)])
def test_boundary_iou_without_a_target(prediction, expected):
    assert BoundaryIoU().add(prediction, EMPTY) == expected


@given(MASK, MASK, st.floats(0.01, 0.9))
def test_boundary_iou_is_symmetric_and_one_for_equal_masks(one, other, ratio):
    value = BoundaryIoU(ratio).add(one, other)
    assert 0 <= value <= 1
    assert value == BoundaryIoU(ratio).add(other, one)
    assert BoundaryIoU(ratio).add(one, one) == 1


@given(MASK, st.integers(1, 9))
def test_a_band_lies_inside_the_mask_and_reaches_all_of_its_contour(mask, distance):
    band = boundary_band(mask, distance)
    assert not (band & ~mask).any()
    assert band[tuple(contour(mask).T)].all()


def test_the_widest_band_is_the_mask_and_gives_its_iou():
    one, other = rectangle(slice(2, 12), slice(2, 12)), rectangle(slice(2, 12), slice(3, 13))
    assert BoundaryIoU(0.9).add(one, other) == 90 / 110


def test_distance_of_two_points_in_pixels_and_scaled():
    one, other = rectangle(slice(0, 1), slice(0, 1)), rectangle(slice(3, 4), slice(4, 5))
    assert AverageHausdorff(side=None).add(one, other) == 5.0
    assert AverageHausdorff(side=256).add(one, other) == 5.0 * 256 / 20
    wide = [np.pad(mask, ((0, 0), (0, 20))) for mask in (one, other)]  # the longer side counts
    assert AverageHausdorff(side=256).add(*wide) == 5.0 * 256 / 40


def test_both_directions_count_by_halves():
    """From the point to the line it is 0; from the line's 5 pixels to the point 0 + 1 + 2 + 3 + 4."""
    point, line = rectangle(slice(0, 1), slice(0, 1)), rectangle(slice(0, 1), slice(0, 5))
    assert AverageHausdorff(side=None).add(point, line) == (0 + 2) / 2


def test_means_run_over_the_samples_above_each_threshold():
    metrics = AverageHausdorff(thresholds=(0.5, 0.75, 0.9), side=None)
    truth = rectangle(slice(0, 1), slice(0, 8))
    metrics.add(truth, truth)  # IoU 1, distance 0
    metrics.add(rectangle(slice(0, 1), slice(0, 6)), truth, kind="short")  # IoU 6 / 8, which is not above 0.75
    metrics.add(rectangle(slice(0, 1), slice(6, 8)), truth)  # IoU 2 / 8
    metrics.add(None, truth)
    metrics.add(None, np.zeros_like(truth))
    short, end = (0 + 3 / 8) / 2, (0 + 21 / 8) / 2
    assert metrics.compute() == {
        "mahd": (0 + short + end) / 3,
        "mahd@0.5": short / 2,
        "mahd@0.75": 0.0,
        "mahd@0.9": 0.0,
        "count@0.5": 2,
        "count@0.75": 1,
        "count@0.9": 1,
        "undefined": 2,
        "count": 5,
        "mahd_short": short,
        "mahd@0.5_short": short,
    }


@pytest.mark.parametrize("pair", [(None, ~EMPTY), (~EMPTY, EMPTY), (None, EMPTY)])
def test_an_empty_mask_has_no_distance(pair):
    metrics = AverageHausdorff()
    assert metrics.add(*pair) is None
    result = metrics.compute()
    assert result["undefined"] == result["count"] == 1
    assert not [name for name in result if name.startswith("mahd")]


@given(MASK.filter(np.any), MASK.filter(np.any))
def test_distances_are_symmetric_and_vanish_for_equal_contours(one, other):
    distance = AverageHausdorff().add(one, other)
    assert distance == AverageHausdorff().add(other, one) >= 0
    assert (distance == 0) == np.array_equal(contour(one), contour(other))


@given(MASK.filter(np.any), MASK.filter(np.any), st.integers(0, 5), st.integers(0, 5))
def test_distances_do_not_depend_on_where_the_masks_are(one, other, down, right):
    wide = [np.pad(mask, 6) for mask in (one, other)]
    moved = [np.roll(mask, (down, right), (0, 1)) for mask in wide]
    assert AverageHausdorff().add(*wide) == pytest.approx(AverageHausdorff().add(*moved), rel=1e-12)


@pytest.mark.parametrize("faulty", [lambda: BoundaryIoU(0), lambda: BoundaryIoU(2), lambda: AverageHausdorff((1.0,))])
def test_faulty_settings(faulty):
    with pytest.raises(ValueError, match="dilation_ratio|thresholds"):
        faulty()
