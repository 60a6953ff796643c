"""Pr@X (precision at IoU thresholds). The README beside this file has the protocol."""

import evaluate  # noqa: F401 (`evaluate.load` checks that it is here)

try:
    from trl_recipes.metrics import SegmentationMetrics, hub
except ImportError as error:
    raise ImportError("this metric needs the package argenseg: pip install 'argenseg[eval]'") from error


class PrecisionAtIoU(hub.MaskMetric):
    """Pr@X (precision at IoU thresholds)."""

    accumulator = SegmentationMetrics
    names = ("pr@", "count")
    description = """
Share of samples with a target whose IoU is at least X.
"""
    citation_text = """
@inproceedings{hu2016segmentation,
  title={Segmentation from Natural Language Expressions},
  author={Hu, Ronghang and Rohrbach, Marcus and Darrell, Trevor},
  booktitle={ECCV},
  year={2016}
}
"""
