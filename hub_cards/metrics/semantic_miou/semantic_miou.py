"""Semantic mIoU (confusion matrix). The README beside this file has the protocol."""

import evaluate  # noqa: F401 (`evaluate.load` checks that it is here)

try:
    from trl_recipes.metrics import SemanticIoU, hub
except ImportError as error:
    raise ImportError("this metric needs the package argenseg: pip install 'argenseg[eval]'") from error


class SemanticMeanIoU(hub.LabelMetric):
    """Semantic mIoU (confusion matrix)."""

    accumulator = SemanticIoU
    names = ("miou", "pixel_accuracy", "mean_accuracy", "fwiou", "iou_", "classes", "count")
    description = """
Mean IoU over classes from one confusion matrix of the whole set, with an ignore label.
"""
    citation_text = """
@inproceedings{long2015fully,
  title={Fully Convolutional Networks for Semantic Segmentation},
  author={Long, Jonathan and Shelhamer, Evan and Darrell, Trevor},
  booktitle={CVPR},
  year={2015}
}
"""
