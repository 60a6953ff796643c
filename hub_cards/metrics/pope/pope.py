"""POPE (object hallucination). The README beside this file has the protocol."""

import evaluate  # noqa: F401 (`evaluate.load` checks that it is here)

try:
    from trl_recipes.metrics import Pope, hub
except ImportError as error:
    raise ImportError("this metric needs the package argenseg: pip install 'argenseg[eval]'") from error


class PollingObjects(hub.TextMetric):
    """POPE (object hallucination)."""

    accumulator = Pope
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed", "count")
    description = """
Accuracy, precision, recall, F1 and yes-ratio of yes/no answers about objects.
"""
    citation_text = """
@inproceedings{li2023pope,
  title={Evaluating Object Hallucination in Large Vision-Language Models},
  author={Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
  booktitle={EMNLP},
  year={2023}
}
"""
