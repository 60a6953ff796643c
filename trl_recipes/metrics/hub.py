"""What the `evaluate` modules under `hub_cards/metrics/` share: inputs in any form, and the accumulators behind them.

    metric = evaluate.load("hub_cards/metrics/ciou")
    metric.add_batch(predictions=masks, references=truths, ids=ids)  # many times
    metric.compute()

Samples go to disk as they come, masks as COCO RLE, label maps as PNG; `compute` reads them in that form. With
`evaluate.load(..., num_process=N, process_id=i, experiment_id="...")` process 0 computes over all samples and the
others get None; a sample with the same id in several processes counts once.
"""

from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from typing import Any

import datasets
import evaluate
import numpy as np
from PIL import Image

from .accumulator import Accumulator
from .masks import load_pair, to_rle
from .semantic import load_labels

RLE = {"size": datasets.Sequence(datasets.Value("int32")), "counts": datasets.Value("string")}
BOX = datasets.Sequence(datasets.Value("float64"))
LABELS = datasets.Image(decode=False)
TEXT = datasets.Value("string")
NUMBER = datasets.Value("float64")

OPTIONAL_INPUTS = """
    ids (list of str or int, optional): names of the samples; a name that comes again with the same result counts once.
    kinds (list of str, optional): a group for every sample, with a value `<name>_<kind>` of its own.
"""


class AccumulatedMetric(evaluate.Metric):
    """An `evaluate.Metric` that computes with an `Accumulator`.

    A module says `feature` (how predictions and references are stored), `accumulator` (the class; options of `compute`
    are its arguments), `names` (which of its numbers are this module's), and its texts.
    """

    feature: Any
    accumulator: Callable[..., Accumulator]
    names: tuple[str, ...]
    description: str
    citation_text: str
    inputs_text: str

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": self.feature, "references": self.feature, "ids": TEXT, "kinds": TEXT}
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation_text,
            inputs_description=self.inputs_text + OPTIONAL_INPUTS,
            features=datasets.Features(columns),
        )

    def encode(self, prediction: Any, reference: Any) -> tuple[Any, Any]:
        """One pair as it is stored; ValueError for what is not of the metric's kind."""
        return prediction, reference

    def decode(self, stored: Any) -> Any:
        """One stored prediction or reference as `Accumulator.add` takes it."""
        return stored

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds samples, which are stored on disk.

        Args:
            predictions: one for every sample.
            references: the truths, in the same order.
        """
        predictions, references = _listed(predictions, "predictions"), _listed(references, "references")
        ids, kinds = kwargs.pop("ids", None), kwargs.pop("kinds", None)
        columns = {
            "ids": [""] * len(predictions) if ids is None else ["" if one is None else str(one) for one in ids],
            "kinds": [""] * len(predictions) if kinds is None else [kind or "" for kind in kinds],
        }
        lengths = {"predictions": len(predictions), "references": len(references)}
        lengths |= {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"every sample needs one of each input; their numbers differ: {lengths}")
        pairs = [self.encode(*pair) for pair in zip(predictions, references, strict=True)]
        super().add_batch(
            predictions=[one for one, _ in pairs], references=[other for _, other in pairs], **columns, **kwargs
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds one sample.

        Args:
            prediction: None, for masks and boxes: the model gave none.
            reference: the truth.
        """
        named = {f"{name}s": [kwargs.pop(name)] for name in ("id", "kind") if name in kwargs}
        self.add_batch(predictions=[prediction], references=[reference], **named, **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float] | None:
        """Computes over all samples that were added, and over those given here.

        Args:
            predictions: further samples.
            references: their truths.
        """
        named = {name: kwargs.pop(name) for name in ("ids", "kinds") if name in kwargs}
        alone = self.writer is None and self.num_process > 1  # a process that had no sample still has to appear
        if predictions is not None or references is not None or named:
            self.add_batch(predictions=predictions, references=references, **named)
        elif alone:
            self.add_batch(predictions=[], references=[])
        return super().compute(**kwargs)

    def _compute(
        self, *, predictions: Any = None, references: Any = None, ids: Any = (), kinds: Any = (), **options: Any
    ) -> dict[str, float]:
        found = type(self).accumulator(**options)
        for prediction, reference, name, kind in zip(predictions, references, ids, kinds, strict=True):
            extra = {"kind": kind} if "kind" in found.columns else {}
            found.add(self.decode(prediction), self.decode(reference), sample_id=name or None, **extra)  # type: ignore[attr-defined]
        return {name: value for name, value in found.compute().items() if name.startswith(self.names)}


def _listed(values: Any, name: str) -> Sequence[Any]:
    if values is None or isinstance(values, (str, dict, Image.Image)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list with one entry for every sample, not {type(values).__name__}")
    return list(values)


class MaskMetric(AccumulatedMetric):
    """Predictions and references are masks (H, W) in any form of `load_mask`; a prediction may be None."""

    feature = RLE
    inputs_text = """
Args:
    predictions (list): masks (H, W) as bool arrays, COCO RLE dicts or black and white PIL images; None if the model
        drew nothing.
    references (list): the true masks, of the predictions' sizes; an empty one if there is no target.
"""

    def encode(self, prediction: Any, reference: Any) -> tuple[Any, Any]:
        prediction, reference = load_pair(prediction, reference)
        return to_rle(prediction), to_rle(reference)


class LabelMetric(AccumulatedMetric):
    """Predictions and references are label maps (H, W) of integers from 0 to 65535."""

    feature = LABELS
    inputs_text = """
Args:
    predictions (list): label maps (H, W) as integer arrays or PIL images.
    references (list): the true label maps, of the predictions' sizes.
"""

    def encode(self, prediction: Any, reference: Any) -> tuple[Any, Any]:
        return _to_png(prediction), _to_png(reference)

    def decode(self, stored: Any) -> Any:
        return np.asarray(Image.open(BytesIO(stored["bytes"])))


def _to_png(labels: Any) -> dict[str, Any]:
    labels = load_labels(labels)
    if labels.size and not 0 <= labels.min() <= labels.max() <= 65535:
        raise ValueError(f"labels lie between 0 and 65535, not {labels.min()} and {labels.max()}; use 255 for no class")
    file = BytesIO()
    Image.fromarray(labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


class BoxMetric(AccumulatedMetric):
    """Predictions and references are boxes of four numbers; a prediction may be None."""

    feature = BOX
    inputs_text = """
Args:
    predictions (list): boxes of four numbers; None if the answer held no box.
    references (list): the true boxes.
"""

    def encode(self, prediction: Any, reference: Any) -> tuple[Any, Any]:
        return _numbers(prediction), [float(value) for value in reference]


def _numbers(box: Any) -> list[float]:
    """A box as floats; what is no box becomes an empty list, a wrong answer."""
    try:
        return [float(value) for value in box]
    except (TypeError, ValueError):
        return []


class TextMetric(AccumulatedMetric):
    """Predictions and references are texts."""

    feature = TEXT
    inputs_text = """
Args:
    predictions (list of str): answers as the model gave them.
    references (list of str): the right answers, "yes" or "no".
"""


class ScoreMetric(AccumulatedMetric):
    """Predictions are scores in [0, 1], references what they should tell."""

    feature = NUMBER
    inputs_text = """
Args:
    predictions (list of float): scores of the drawn masks, in [0, 1].
    references (list of float): IoUs of those masks with the truth.
"""
