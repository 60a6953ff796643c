"""Metrics of masks, label maps, boxes and yes/no answers: the one place of the mathematics.

Every metric is an *accumulator*. It keeps one small record (a few integers or exact floats) per sample, never a mask:

    metrics = SegmentationMetrics(thresholds=(0.5, 0.7, 0.9))
    for sample in samples:
        metrics.add(prediction, truth, sample_id=sample["id"])  # returns the value of this sample
    metrics.compute()                                           # {"giou": ..., "ciou": ..., "count": ...}

- `add(prediction, truth, ..., sample_id=None)`: a sample whose id is already there is counted once (samplers pad their
  last batch); with another result it is a `ValueError`. Samples without an id are all counted.
- `state()`: a dict that `json.dumps` takes: the settings and the records. `merge(state or accumulator)` adds the
  records of another process and returns self. Sums are correctly rounded (`math.fsum`) or integers, so N processes, in
  any order, give the very bits of one process.
- `len(metrics)`: samples so far. `sample_ids`: their ids. `metrics.values()`: `{sample_id: value that add returned}`,
  to sort a gallery by.
- `bootstrap(metrics, repeats=1000, seed=0, level=0.95, clusters=None)`: `{name: (low, high)}` for every name of
  `compute()`; `clusters` maps sample ids to what is drawn as a whole (the image, where it has many expressions).

Masks are given as `processing.load_mask` takes them: bool arrays, COCO RLE dicts, PIL images, paths; None for a
prediction is "nothing was drawn". The classes, and below them the keys of their `compute()`:

    gIoU, cIoU, N-acc, T-acc, Pr@X   SegmentationMetrics(thresholds=())
                                     giou ciou count n_acc t_acc pr@<X> giou_<kind>
    boundary IoU                     BoundaryIoU(dilation_ratio=0.02)
                                     boundary_iou count boundary_iou_<kind>
    AHD, mAHD                        AverageHausdorff(thresholds=(0.5, 0.6, 0.7, 0.8, 0.9), side=256)
                                     mahd mahd@<T> count@<T> undefined count
    semantic mIoU                    SemanticIoU(num_classes, ignore_label=255, names=None)
                                     miou miou_any pixel_accuracy mean_accuracy fwiou classes count iou_<name>
    REC acc@0.5                      BoxAccuracy(threshold=0.5, box_format="xyxy")
                                     acc@0.5 mean_iou invalid count
    POPE                             Pope()
                                     accuracy precision recall f1 yes_ratio unparsed count, and <name>_<kind>
    questions answered in words      VqaAccuracy(threshold=0.5)
                                     accuracy mean_iou f1 invalid count, and the first three as <name>_<kind>
    calibration of mask scores       MaskCalibration(bins=15, threshold=0.5)
                                     ece ece_iou auroc correct count

A number that is not defined (`n_acc` without no-target samples, `auroc` of one class) is left out, never NaN.
"""

from .accumulator import Accumulator, bootstrap
from .answers import BoxAccuracy, Pope, box_of_mask
from .boundaries import AverageHausdorff, BoundaryIoU
from .calibration import MaskCalibration
from .masks import to_rle
from .segmentation import SegmentationMetrics, best_constant_mask
from .semantic import SemanticIoU
from .vqa import VqaAccuracy

__all__ = [
    "Accumulator",
    "AverageHausdorff",
    "BoundaryIoU",
    "BoxAccuracy",
    "MaskCalibration",
    "Pope",
    "SegmentationMetrics",
    "SemanticIoU",
    "VqaAccuracy",
    "best_constant_mask",
    "bootstrap",
    "box_of_mask",
    "to_rle",
]
