"""N-acc and T-acc (gRefCOCO). The README beside this file has the protocol."""

import evaluate  # noqa: F401 (`evaluate.load` checks that it is here)

try:
    from trl_recipes.metrics import SegmentationMetrics, hub
except ImportError as error:
    raise ImportError("this metric needs the package argenseg: pip install 'argenseg[eval]'") from error


class NoTargetAccuracy(hub.MaskMetric):
    """N-acc and T-acc (gRefCOCO)."""

    accumulator = SegmentationMetrics
    names = ("n_acc", "t_acc", "count")
    description = """
How often a model draws nothing where nothing is, and something where something is.
"""
    citation_text = """
@inproceedings{liu2023gres,
  title={GRES: Generalized Referring Expression Segmentation},
  author={Liu, Chang and Ding, Henghui and Jiang, Xudong},
  booktitle={CVPR},
  year={2023}
}
"""
