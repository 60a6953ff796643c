"""mAHD (average Hausdorff distance of contours). The README beside this file has the protocol."""

import evaluate  # noqa: F401 (`evaluate.load` checks that it is here)

try:
    from trl_recipes.metrics import AverageHausdorff, hub
except ImportError as error:
    raise ImportError("this metric needs the package argenseg: pip install 'argenseg[eval]'") from error


class MeanAverageHausdorff(hub.MaskMetric):
    """mAHD (average Hausdorff distance of contours)."""

    accumulator = AverageHausdorff
    names = ("mahd", "count", "undefined")
    description = """
Mean distance between contours of predicted and true masks, under IoU thresholds (LlamaSeg).
"""
    citation_text = """
@article{llamaseg2025,
  title={LlamaSeg: Image Segmentation via Autoregressive Mask Generation},
  journal={arXiv preprint arXiv:2505.19422},
  year={2025}
}
"""
