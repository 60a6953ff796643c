"""Calibration of mask scores. The README beside this file has the protocol."""

import evaluate  # noqa: F401 (`evaluate.load` checks that it is here)

try:
    from trl_recipes.metrics import MaskCalibration, hub
except ImportError as error:
    raise ImportError("this metric needs the package argenseg: pip install 'argenseg[eval]'") from error


class MaskScoreCalibration(hub.ScoreMetric):
    """Calibration of mask scores."""

    accumulator = MaskCalibration
    names = ("ece", "auroc", "correct", "count")
    description = """
ECE and AUROC of mask scores against the IoU that the masks turned out to have.
"""
    citation_text = """
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={ICML},
  year={2017}
}
"""
