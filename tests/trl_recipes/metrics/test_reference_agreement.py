"""Every metric against an implementation by other people, on 1,000 random cases; `pytest -s` prints the differences.

A case is a mask, a box, a label map, or a small set of them where the metric is one of sets. Rules that no library has
(no-target samples) are worked by hand in the files of the metrics.
"""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from scipy import ndimage, stats
from scipy.spatial.distance import cdist
from skimage.metrics import hausdorff_distance
from skimage.segmentation import find_boundaries
from sklearn.metrics import roc_auc_score
from torchmetrics.functional import classification as tm
from torchmetrics.functional.segmentation import mean_iou

from trl_recipes.metrics import (
    AverageHausdorff,
    BoundaryIoU,
    BoxAccuracy,
    MaskCalibration,
    Pope,
    SegmentationMetrics,
    SemanticIoU,
)
from trl_recipes.metrics.boundaries import boundary_band, contour, directed_distances

CASES = 1000
ROUNDING = 1e-12  # both in float64
SINGLE = 2e-6  # the other in float32


@pytest.fixture(scope="module")
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Blobs (H, W) of many sizes, and the same blobs disturbed: moved, speckled, replaced, or hardly changed."""
    rng = np.random.default_rng(7)
    found = []
    for case in range(CASES):
        size = tuple(rng.integers(8, 40, 2))
        truth = _blob(rng, size)
        prediction = [
            np.roll(truth, rng.integers(-3, 4, 2), (0, 1)),
            truth ^ (rng.random(size) < 0.03),
            _blob(rng, size),
            truth,
        ][case % 4]
        found.append((prediction if prediction.any() else truth, truth))
    return found


def _blob(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    field = ndimage.gaussian_filter(rng.standard_normal(size), rng.uniform(0.5, 4))
    return field >= np.quantile(field, rng.uniform(0.05, 0.95))


def coco_iou(one: np.ndarray, other: np.ndarray) -> float:
    runs = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in (one, other)]
    return float(coco_mask.iou(runs[:1], runs[1:], [0])[0, 0])


def report(name: str, ours, theirs, tolerance: float) -> None:
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    assert ours.shape == theirs.shape and len(ours) >= CASES
    assert ours.std() > 0.01, "the cases are all alike"
    worst = np.abs(ours - theirs).max()
    print(f"\n{name}: {len(ours)} cases, max difference {worst:.1e}", end="")
    assert worst <= tolerance


def test_iou_of_a_sample(pairs):
    metrics = SegmentationMetrics()
    report("IoU / pycocotools", [metrics.add(*pair) for pair in pairs], [coco_iou(*pair) for pair in pairs], ROUNDING)


SETS, PER_SET = CASES, 4


def sets() -> tuple[np.ndarray, np.ndarray]:
    """Predictions and truths (sets, samples, 6, 8); no truth is empty."""
    rng = np.random.default_rng(8)
    truths = rng.random((SETS, PER_SET, 6, 8)) < rng.uniform(0.1, 0.9, (SETS, PER_SET, 1, 1))
    truths[..., 0, 0] = True
    noise = rng.random(truths.shape) < rng.uniform(0, 0.6, (SETS, PER_SET, 1, 1))
    return truths ^ noise, truths


def test_giou_and_ciou_of_sets():
    predictions, truths = sets()
    ours = []
    for some, true in zip(predictions, truths, strict=True):
        metrics = SegmentationMetrics()
        for pair in zip(some, true, strict=True):
            metrics.add(*pair)
        ours.append(metrics.compute())
    one_hot = [torch.from_numpy(np.stack([~m, m], 2).reshape(-1, 2, 6, 8)).int() for m in (predictions, truths)]
    means = mean_iou(*one_hot, num_classes=2, include_background=False, per_class=True).reshape(SETS, PER_SET).mean(1)
    report("gIoU / torchmetrics mean_iou", [one["giou"] for one in ours], means.numpy(), SINGLE)
    pixels = [torch.from_numpy(m.reshape(SETS, -1)).int() for m in (predictions, truths)]
    ratios = [tm.binary_jaccard_index(*pair, validate_args=False).item() for pair in zip(*pixels, strict=True)]
    report("cIoU / torchmetrics binary_jaccard_index", [one["ciou"] for one in ours], ratios, SINGLE)


def test_precision_at_thresholds(pairs):
    rng = np.random.default_rng(9)
    ious = np.array([coco_iou(*pair) for pair in pairs])
    ours, theirs = [], []
    for _ in range(CASES):
        thresholds, rows = sorted(rng.random(2).round(2)), rng.integers(CASES, size=5)
        metrics = SegmentationMetrics(thresholds)
        for row in rows:
            metrics.add(*pairs[row])
        ours.append([metrics.compute()[f"pr@{x:g}"] for x in thresholds])
        theirs.append([stats.percentileofscore(-ious[rows], -x, "weak") / 100 for x in thresholds])
    report("Pr@X / scipy percentileofscore of pycocotools' IoU", ours, theirs, ROUNDING)


def test_no_target_accuracies():
    rng = np.random.default_rng(10)
    absent, rejected = rng.random((2, CASES, 12)) < 0.4
    absent[:, 0], absent[:, 1] = True, False
    ours = []
    for truth_row, answer_row in zip(absent, rejected, strict=True):
        metrics = SegmentationMetrics()
        for no_target, no_mask in zip(truth_row, answer_row, strict=True):
            metrics.add(None if no_mask else np.array([[True, False]]), np.array([[not no_target, False]]))
        ours.append(metrics.compute())
    pair = torch.from_numpy(rejected).int(), torch.from_numpy(absent).int()
    recall = tm.binary_recall(*pair, multidim_average="samplewise")
    specificity = tm.binary_specificity(*pair, multidim_average="samplewise")
    report("N-acc / torchmetrics binary_recall", [one["n_acc"] for one in ours], recall, SINGLE)
    report("T-acc / torchmetrics binary_specificity", [one["t_acc"] for one in ours], specificity, SINGLE)


def test_boundary_iou(pairs):
    rng = np.random.default_rng(11)
    ours, theirs = [], []
    for prediction, truth in pairs:
        ratio = rng.uniform(0.02, 0.15)
        distance = max(1, round(ratio * np.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)))
        bands = []
        for mask in (prediction, truth):
            inner = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=0)
            bands.append(mask & ~inner)
            assert np.array_equal(boundary_band(mask, distance), bands[-1])
        ours.append(BoundaryIoU(ratio).add(prediction, truth))
        theirs.append(coco_iou(*bands))
    report("boundary IoU / scipy binary_erosion and pycocotools", ours, theirs, ROUNDING)


def test_average_hausdorff_distance(pairs):
    ours, theirs, longer, modified = [], [], [], []
    for prediction, truth in pairs:
        edges = [mask & ~ndimage.binary_erosion(mask, border_value=0) for mask in (prediction, truth)]
        distances = cdist(np.argwhere(edges[0]), np.argwhere(edges[1]))
        theirs.append((distances.min(1).mean() + distances.min(0).mean()) / 2)
        ours.append(AverageHausdorff(side=None).add(prediction, truth))
        longer.append(max(directed_distances(prediction, truth)))
        modified.append(hausdorff_distance(*edges, method="modified"))
    report("AHD / scipy cdist", ours, theirs, ROUNDING)
    report("the longer directed mean / skimage modified Hausdorff", longer, modified, ROUNDING)


def test_contours_are_those_of_skimage(pairs):
    for mask, _ in pairs:
        inside = np.pad(mask, 1)  # skimage sees no boundary at the picture's edge
        assert np.array_equal(contour(mask), np.argwhere(find_boundaries(inside, connectivity=1, mode="inner")) - 1)


def test_mahd_under_thresholds(pairs):
    rng = np.random.default_rng(12)
    single = AverageHausdorff(side=100)
    distances = np.array([single.add(*pair) for pair in pairs])
    ious = np.array([coco_iou(*pair) for pair in pairs])
    rows = np.concatenate([np.arange(CASES).reshape(-1, 1), rng.integers(CASES, size=(CASES, 5))], axis=1)
    ours, theirs = [], []
    for picked in rows:
        metrics = AverageHausdorff(thresholds=(0.5,), side=100)
        for row in picked:
            metrics._store(single._unnamed[row], None)
        good = distances[picked][ious[picked] > 0.5]
        found = metrics.compute()
        assert found["count@0.5"] == len(good) and ("mahd@0.5" in found) == bool(len(good))
        ours.append(found.get("mahd@0.5", 0.0))
        theirs.append(stats.tmean(good) if len(good) else 0.0)
    report("mAHD@0.5 / scipy tmean of AHD, pycocotools' IoU", ours, theirs, ROUNDING)


def test_semantic_iou_and_accuracies():
    rng = np.random.default_rng(13)
    classes, names = 6, ("miou", "pixel_accuracy", "mean_accuracy", "fwiou")
    ours, theirs, per_class, their_class = [], [], [], []
    for _ in range(CASES):
        truth = rng.integers(0, rng.integers(2, classes + 1), (7, 9))
        prediction = np.where(rng.random(truth.shape) < rng.random(), rng.integers(0, classes, truth.shape), truth)
        truth[rng.random(truth.shape) < 0.1] = 255
        truth[0, 0], prediction[0, 0] = 0, 0
        metrics = SemanticIoU(classes)
        metrics.add(prediction, truth)
        found = metrics.compute()
        ours.append([found[name] for name in names])
        options = dict(num_classes=classes, ignore_index=255, validate_args=False)
        pair = torch.from_numpy(prediction), torch.from_numpy(truth)
        matrix = tm.multiclass_confusion_matrix(*pair, **options)
        assert np.array_equal(metrics.confusion()[:, :-1], matrix.numpy())
        iou = tm.multiclass_jaccard_index(*pair, average=None, **options).double()
        accuracy = tm.multiclass_accuracy(*pair, average=None, **options).double()
        pixels = matrix.sum(1).double()
        here = pixels > 0
        micro = tm.multiclass_accuracy(*pair, average="micro", **options)
        theirs.append([iou[here].mean(), micro, accuracy[here].mean(), (iou * pixels).sum() / pixels.sum()])
        per_class += [found.get(f"iou_{c}", 0.0) for c in range(classes)]
        their_class += iou.where(here, 0).tolist()
    for column, name in enumerate(names):
        report(f"{name} / torchmetrics", [one[column] for one in ours], [one[column] for one in theirs], SINGLE)
    report("IoU of a class / torchmetrics multiclass_jaccard_index", per_class, their_class, SINGLE)


def test_box_iou_and_accuracy():
    rng = np.random.default_rng(14)
    truths = rng.uniform(0, 50, (CASES, 4)) + [0, 0, 1, 1]
    predictions = truths + rng.normal(0, 6, truths.shape)
    predictions[:, 2:] = np.abs(predictions[:, 2:]) + 0.1
    theirs = np.diagonal(coco_mask.iou(predictions, truths, [0] * CASES))
    metrics = BoxAccuracy(box_format="xywh")
    report("box IoU / pycocotools", [metrics.add(*p) for p in zip(predictions, truths, strict=True)], theirs, ROUNDING)
    ours, accuracies = [], []
    for _ in range(CASES):
        rows, one = rng.integers(CASES, size=6), BoxAccuracy(box_format="xywh")
        for row in rows:
            one.add(predictions[row], truths[row])
        ours.append(one.compute()["acc@0.5"])
        accuracies.append(stats.percentileofscore(-theirs[rows], -0.5, "weak") / 100)
    report("acc@0.5 / scipy percentileofscore of pycocotools' IoU", ours, accuracies, ROUNDING)


def test_pope():
    rng = np.random.default_rng(15)
    said, expected = rng.random((2, CASES, 10)) < 0.5
    ours = []
    for answers, truths in zip(said, expected, strict=True):
        metrics = Pope()
        for yes, truth in zip(answers, truths, strict=True):
            metrics.add("Yes, there is." if yes else "No, there is not.", bool(truth))
        ours.append(metrics.compute())
    pair = torch.from_numpy(said).int(), torch.from_numpy(expected).int()
    functions = {"accuracy": tm.binary_accuracy, "precision": tm.binary_precision, "recall": tm.binary_recall}
    for name, function in {**functions, "f1": tm.binary_f1_score}.items():
        theirs = function(*pair, multidim_average="samplewise")
        report(f"POPE {name} / torchmetrics", [one[name] for one in ours], theirs, SINGLE)
    report("POPE yes-ratio / numpy", [one["yes_ratio"] for one in ours], said.mean(1), ROUNDING)


def test_calibration():
    rng = np.random.default_rng(16)
    ours, errors, areas, gaps = [], [], [], []
    for _ in range(CASES):
        count, bins = rng.integers(4, 60), int(rng.integers(1, 20))
        scores = rng.random(count).round(2) * 0.98 + 0.007  # ties, but on no edge of a bin
        ious = np.clip(scores + rng.normal(0, 0.4, count), 0, 1)
        ious[:2] = 0.1, 0.9
        metrics = MaskCalibration(bins)
        for pair in zip(scores, ious, strict=True):
            metrics.add(*pair)
        ours.append(metrics.compute())
        right = ious >= 0.5
        pair = torch.from_numpy(scores), torch.from_numpy(right).int()
        errors.append(tm.binary_calibration_error(*pair, n_bins=bins, norm="l1", validate_args=False))
        areas.append(roc_auc_score(right, scores))
        sums = stats.binned_statistic(scores, [scores, ious], "sum", bins, (0, 1)).statistic
        gaps.append(np.abs(sums[0] - sums[1]).sum() / count)
    report("ECE / torchmetrics binary_calibration_error", [one["ece"] for one in ours], errors, SINGLE)
    report("ECE of IoU / scipy binned_statistic", [one["ece_iou"] for one in ours], gaps, ROUNDING)
    report("AUROC / scikit-learn roc_auc_score", [one["auroc"] for one in ours], areas, ROUNDING)
