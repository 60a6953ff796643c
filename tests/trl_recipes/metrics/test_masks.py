"""Forms of masks, and what counting them costs."""

from time import perf_counter

import numpy as np
import pytest
from PIL import Image

from processing import load_mask
from trl_recipes.metrics import BoundaryIoU, SegmentationMetrics, to_rle
from trl_recipes.metrics.masks import count_overlap

MASK = np.array([[True, False, True], [False, False, True]])
FORMS = [
    MASK,
    MASK.astype(np.uint8) * 255,
    Image.fromarray(MASK),
    to_rle(MASK),
    {**to_rle(MASK), "counts": to_rle(MASK)["counts"].encode()},
    {"size": [2, 3], "counts": [0, 1, 3, 2]},
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_counts_alike(form):
    truth = np.array([[True, True, True], [False, False, False]])
    assert SegmentationMetrics().add(form, truth) == SegmentationMetrics().add(truth, form) == 2 / 4


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_runs(form):
    assert to_rle(form) == to_rle(MASK)
    assert np.array_equal(load_mask(to_rle(form)), MASK)


@pytest.mark.parametrize("counts", ["abc", "zzzz"])
def test_broken_runs_are_refused(counts):
    broken = {"size": [2, 3], "counts": counts}
    for pair in [(broken, to_rle(MASK)), (to_rle(MASK), broken)]:
        with pytest.raises(ValueError, match="not a COCO RLE mask"):
            SegmentationMetrics().add(*pair)


def test_no_grey_picture_is_taken_for_a_mask():
    with pytest.raises(ValueError, match="threshold it first"):
        SegmentationMetrics().add(np.linspace(0, 1, 6).reshape(2, 3), MASK)


def test_a_sample_of_a_referring_task_costs_little():
    """480x640, as arrays and as runs; the least of several times, since other programs may run beside this one."""
    y, x = np.mgrid[:480, :640]
    truth, prediction = np.hypot(y - 240, x - 300) < 150, np.hypot(y - 230, x - 310) < 140
    for pair in [(prediction, truth), (to_rle(prediction), to_rle(truth)), (to_rle(prediction), truth)]:
        times = []
        for _ in range(20):
            metrics, start = (SegmentationMetrics((0.5, 0.7, 0.9)), BoundaryIoU()), perf_counter()
            for one in metrics:
                one.add(*pair)
            times.append(perf_counter() - start)
        assert min(times) < 0.005


def test_what_is_ignored_is_no_part_of_the_truth_either():
    row = np.array([[True, True, True]])
    found = count_overlap(prediction=row & [1, 1, 0], truth=row, ignore=row & [0, 0, 1])
    assert found.iou == 1 and found.target == 2
