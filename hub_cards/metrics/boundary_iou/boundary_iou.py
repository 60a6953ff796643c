"""Boundary IoU. The README beside this file has the protocol."""

import evaluate  # noqa: F401 (`evaluate.load` checks that it is here)

try:
    from trl_recipes.metrics import BoundaryIoU, hub
except ImportError as error:
    raise ImportError("this metric needs the package argenseg: pip install 'argenseg[eval]'") from error


class MeanBoundaryIoU(hub.MaskMetric):
    """Boundary IoU."""

    accumulator = BoundaryIoU
    names = ("boundary_iou", "count")
    description = """
Mean IoU of the bands along the contours of predicted and true masks.
"""
    citation_text = """
@inproceedings{cheng2021boundary,
  title={Boundary IoU: Improving Object-Centric Image Segmentation Evaluation},
  author={Cheng, Bowen and Girshick, Ross and Doll\'ar, Piotr and Berg, Alexander C. and Kirillov, Alexander},
  booktitle={CVPR},
  year={2021}
}
"""
