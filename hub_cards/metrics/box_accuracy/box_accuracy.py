"""REC acc@0.5 (box accuracy). The README beside this file has the protocol."""

import evaluate  # noqa: F401 (`evaluate.load` checks that it is here)

try:
    from trl_recipes.metrics import BoxAccuracy, hub
except ImportError as error:
    raise ImportError("this metric needs the package argenseg: pip install 'argenseg[eval]'") from error


class BoxAccuracyAtIoU(hub.BoxMetric):
    """REC acc@0.5 (box accuracy)."""

    accumulator = BoxAccuracy
    names = ("acc@", "mean_iou", "invalid", "count")
    description = """
Share of boxes whose IoU with the true box is at least 0.5.
"""
    citation_text = """
@inproceedings{yu2016modeling,
  title={Modeling Context in Referring Expressions},
  author={Yu, Licheng and Poirson, Patrick and Yang, Shan and Berg, Alexander C. and Berg, Tamara L.},
  booktitle={ECCV},
  year={2016}
}
"""
