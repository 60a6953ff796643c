"""Semantic mIoU: a confusion matrix worked by hand, labels that are no class, inputs."""

import numpy as np
import pytest
from PIL import Image

from trl_recipes.metrics import SemanticIoU
from trl_recipes.metrics.semantic import load_labels

TRUTH = np.array([[0, 0, 0, 1], [1, 1, 255, 255]])
DRAWN = np.array([[0, 0, 1, 1], [1, 2, 0, 255]])  # of the truth's 0: 2 right; of its 1: 2 right, one taken for 2


def test_all_numbers_by_hand():
    metrics = SemanticIoU(4, names=["sky", "tree", "sea", "sand"])
    assert metrics.add(DRAWN, TRUTH) == 4 / 6
    ious = {"iou_sky": 2 / 3, "iou_tree": 2 / 4}
    assert metrics.compute() == {
        "classes": 2,
        "count": 1,
        "miou": pytest.approx((2 / 3 + 2 / 4) / 2, abs=1e-15),
        "miou_any": pytest.approx((2 / 3 + 2 / 4 + 0) / 3, abs=1e-15),
        "pixel_accuracy": 4 / 6,
        "mean_accuracy": pytest.approx(2 / 3, abs=1e-15),
        "fwiou": pytest.approx((3 * (2 / 3) + 3 * (2 / 4)) / 6, abs=1e-15),
        **ious,
    }
    assert metrics.confusion().tolist() == [[2, 1, 0, 0, 0], [0, 2, 1, 0, 0], [0] * 5, [0] * 5]


def test_pixels_without_a_predicted_class_are_misses_and_not_dropped():
    metrics = SemanticIoU(2)
    metrics.add(np.array([[0, 255, -1, 7]]), np.array([[0, 0, 0, 0]]))
    assert metrics.compute()["iou_0"] == 1 / 4
    assert metrics.confusion().tolist() == [[1, 0, 3], [0, 0, 0]]


def test_classes_are_averaged_over_the_set_and_not_over_images():
    metrics = SemanticIoU(2)
    metrics.add(np.array([[0, 0, 0, 0]]), np.array([[0, 0, 0, 1]]))
    metrics.add(np.array([[1, 1]]), np.array([[1, 1]]))
    assert metrics.compute()["miou"] == pytest.approx((3 / 4 + 2 / 3) / 2, abs=1e-15)


def test_a_set_of_ignored_pixels_has_counts_alone():
    metrics = SemanticIoU(2)
    assert metrics.add(np.array([[1]]), np.array([[255]])) == 1.0
    assert metrics.compute() == {"classes": 0, "count": 1}


def test_without_an_ignore_label_every_label_is_a_class():
    metrics = SemanticIoU(256, ignore_label=None)
    metrics.add(np.array([[255, 0]]), np.array([[255, 255]]))
    assert metrics.compute()["iou_255"] == 1 / 2


def test_label_zero_may_be_the_ignored_one():
    metrics = SemanticIoU(3, ignore_label=0)
    metrics.add(np.array([[0, 1, 1]]), np.array([[1, 1, 0]]))
    assert metrics.compute()["iou_1"] == 1 / 2


def test_forms_of_a_label_map(tmp_path):
    palette = Image.fromarray(TRUTH.astype(np.uint8)).convert("P")
    palette.putdata(TRUTH.ravel().tolist())
    sixteen = Image.fromarray(TRUTH.astype(np.uint16))
    sixteen.save(tmp_path / "labels.png")
    path = tmp_path / "labels.png"
    for form in (TRUTH, TRUTH.astype(np.uint8), palette, sixteen, path, str(path)):
        assert np.array_equal(load_labels(form), TRUTH)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 2, 3), int), r"integers \(H, W\).*\(2, 2, 3\)"),
        (np.zeros((2, 2)), "float64"),
        (Image.new("RGB", (2, 2)), "one channel.*RGB"),
    ],
)
def test_what_is_no_label_map_is_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        SemanticIoU(2).add(labels, np.zeros((2, 2), int))


def test_faulty_truths_sizes_and_names():
    with pytest.raises(ValueError, match="the label 9; classes are 0 to 1, ignored is 255"):
        SemanticIoU(2).add(np.array([[0]]), np.array([[9]]))
    with pytest.raises(ValueError, match="resize the prediction"):
        SemanticIoU(2).add(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="2 classes need as many different names"):
        SemanticIoU(2, names=["a", "a"])
    with pytest.raises(TypeError, match="not list"):
        SemanticIoU(2).add([[0]], [[0]])
