"""Scores of stored predictions, in the order of sample ids: nothing depends on who predicted what, or when."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from processing.mask_inputs import load_mask

from ..metrics import (
    Accumulator,
    AverageHausdorff,
    BoundaryIoU,
    BoxAccuracy,
    MaskCalibration,
    Pope,
    SegmentationMetrics,
    SemanticIoU,
    VqaAccuracy,
    best_constant_mask,
    bootstrap,
    box_of_mask,
    to_rle,
)
from ..metrics.masks import load_pair
from ..tasks import Sample, Samples, Task
from .store import PredictionStore

VOID = -1  # of the label maps that readers make
MAKERS: dict[str, Callable[[Sequence[str]], Accumulator]] = {
    "segmentation": lambda names: SegmentationMetrics((0.5, 0.7, 0.8, 0.9)),
    "boundary_iou": lambda names: BoundaryIoU(),
    "ahd": lambda names: AverageHausdorff(),
    "calibration": lambda names: MaskCalibration(),
    "box": lambda names: BoxAccuracy(),
    "pope": lambda names: Pope(),
    "vqa": lambda names: VqaAccuracy(),
    "semantic": lambda names: SemanticIoU(len(names), VOID, names),
}
EXTRA = ("boundary_iou", "ahd", "calibration")  # of tasks answered by masks, at the user's wish
INVALID = {
    "text": "no words",
    "pope": "neither yes nor no",
    "vqa": "a mask was drawn, or no words, or no box where one was asked for",
    "box": "no mask, so no box",
    "always": "no mask, though there is always something to segment",
    "sometimes": "neither a mask nor words",
}


@dataclass
class Scores:
    """Everything that is computed of a run.

    Attributes:
        metrics: by the names that the task gives them.
        values: (id, value) of every answer in the order of ids, the better the higher, for the gallery: IoU, right or
            wrong, or for label maps (by the id of the image's first class) the share of right pixels.
        groups, kinds: sample id -> image, kind.
        counts: of answers: `total`, `not_drawn`, `invalid`.
    """

    task: Task
    metrics: dict[str, Accumulator]
    class_names: Sequence[str] = ()
    kinds: dict[str, str] = field(default_factory=dict)
    values: list[tuple[str, float]] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)
    truths: list[dict[str, Any]] = field(default_factory=list)
    with_baseline: bool = False

    @classmethod
    def for_task(cls, task: Task, extra: Sequence[str] = (), class_names: Sequence[str] = ()) -> "Scores":
        """Empty scores. Raises ValueError for an extra metric that the task cannot have."""
        if extra and task.answer != "mask":
            raise ValueError(f"{', '.join(extra)}: for tasks that are answered by masks; {task.name} is not")
        names = [*(name for name in task.metrics if name in MAKERS), *extra]
        scores = cls(task, {name: MAKERS[name](class_names) for name in dict.fromkeys(names)}, class_names)
        scores.with_baseline = "best_constant" in task.metrics
        return scores

    @property
    def main(self) -> str:
        return next(iter(self.metrics))

    def add(self, sample: Sample, prediction: dict[str, Any]) -> None:
        """Counts one answer of a task whose answers stand alone."""
        self._count(sample, prediction)
        self.groups[sample.id], self.kinds[sample.id] = sample.group or sample.id, sample.kind
        if self.task.answer == "text":
            options: dict[str, Any] = {}
            if self.main == "vqa":
                options = {"accepted": sample.accepted, "drawn": prediction["mask"] is not None}
            value = self._store_main(self.metrics[self.main], sample, prediction["text"], sample.answer, **options)
        elif self.task.answer == "box":
            mask = prediction["mask"]
            box = None if mask is None else box_of_mask(load_mask(mask))
            value = self._store_main(self.metrics[self.main], sample, box, sample.box)
        else:
            value = self._add_mask(sample, prediction)
        self.values.append((sample.id, value))

    def add_image(self, samples: Sequence[Sample], predictions: Sequence[dict[str, Any]]) -> None:
        """Counts one image of a closed-vocabulary task: its samples are the classes, in order."""
        for sample, prediction in zip(samples, predictions, strict=True):
            self._count(sample, prediction)
        first = samples[0]
        assert first.load_labels is not None
        truth = first.load_labels()
        self.groups[first.id] = first.group
        predicted = overlay_classes(predictions, truth.shape)
        value = self._store_main(self.metrics[self.main], first, predicted, truth)
        self.values.append((first.id, value))

    def _count(self, sample: Sample, prediction: dict[str, Any]) -> None:
        drawn, words = prediction["mask"] is not None, bool(prediction["text"].strip())
        always, answer = self.task.targets == "always", self.task.answer
        bad = not words if answer == "text" else not drawn if answer == "box" or always else not (drawn or words)
        self.counts.update(total=1, not_drawn=int(not drawn), invalid=int(bad))

    def _store_main(self, metric: Any, sample: Sample, predicted: Any, truth: Any, **options: Any) -> float:
        try:
            return metric.add(predicted, truth, kind=sample.kind, sample_id=sample.id, **options)
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error

    def _add_mask(self, sample: Sample, prediction: dict[str, Any]) -> float:
        assert sample.load_mask is not None
        truth, mask = sample.load_mask(), prediction["mask"]
        ignore = sample.load_ignore() if sample.load_ignore else None
        iou = self._store_main(self.metrics["segmentation"], sample, mask, truth, ignore=ignore)
        if ignore is not None:  # the metrics of contours take none
            mask, truth = load_pair(mask, truth, ignore)
        for name in ("boundary_iou", "ahd"):
            if name in self.metrics:
                self._store_main(self.metrics[name], sample, mask, truth)
        if "calibration" in self.metrics and prediction["score"] is not None:
            calibration: Any = self.metrics["calibration"]
            calibration.add(prediction["score"], iou, sample_id=sample.id)
        if self.with_baseline:
            self.truths.append(to_rle(truth))
        return iou

    def result(self, repeats: int, seed: int, level: float = 0.95) -> dict[str, Any]:
        """All numbers: `metrics`, `confidence`, `kinds`, `answers`, ready for JSON."""
        filled = {name: metric for name, metric in self.metrics.items() if len(metric)}
        found: dict[str, Any] = {"metrics": {name: metric.compute() for name, metric in filled.items()}}
        if self.with_baseline:
            found["metrics"]["best_constant"] = {"giou": best_constant_mask(map(load_mask, self.truths))[1]}
        found["confidence"] = {
            "level": level,
            "repeats": repeats,
            "seed": seed,
            "resampled": "images",
            "intervals": {
                name: bootstrap(metric, repeats, seed, level, clusters=self.groups)
                for name, metric in filled.items()
                if repeats
            },
        }
        found["kinds"] = {kind: self._of_kind(kind).compute() for kind in sorted(set(self.kinds.values()) - {""})}
        found["answers"] = self._answers(filled)
        return found

    def _of_kind(self, kind: str) -> Accumulator:
        """The task's first metric over the samples of one kind."""
        state = self.metrics[self.main].state()
        # without the kind in the records, or every table would hold itself once more
        place = self.metrics[self.main].columns.index("kind")
        rows = {name: row for name, row in state["samples"].items() if self.kinds[name] == kind}
        state["samples"] = {name: [*row[:place], "", *row[place + 1 :]] for name, row in rows.items()}
        return MAKERS[self.main](self.class_names).merge(state)

    def _answers(self, filled: dict[str, Accumulator]) -> dict[str, Any]:
        invalid, answer = self.counts["invalid"], self.task.answer
        meaning = INVALID[answer if answer in INVALID else self.task.targets]
        for metric, name in (("pope", "unparsed"), ("vqa", "invalid")):
            if self.main == metric:
                invalid, meaning = int(filled[metric].compute()[name]), INVALID[metric]
        counts = {"total": self.counts["total"], "not_drawn": self.counts["not_drawn"]}
        if answer == "text":
            del counts["not_drawn"]
        return counts | {"invalid": invalid, "invalid_means": meaning}


def overlay_classes(predictions: Sequence[dict[str, Any]], shape: tuple[int, ...]) -> np.ndarray:
    """The label map (H, W) of one mask a class: a pixel goes to the class with the highest score that claims it, the
    first of several equal ones; no class is VOID. A mask without a score comes last."""
    labels = np.full(shape, VOID, np.int64)
    drawn = [(place, one) for place, one in enumerate(predictions) if one["mask"] is not None]
    drawn.sort(key=lambda found: (-math.inf if found[1]["score"] is None else found[1]["score"], -found[0]))
    for place, prediction in drawn:  # what is painted last is on top
        mask = load_mask(prediction["mask"])
        if mask.shape != shape:
            raise ValueError(f"{prediction['id']}: the mask is {mask.shape}, the label map {shape}")
        labels[mask] = place
    return labels


def score(
    task: Task,
    samples: Samples,
    store: PredictionStore,
    extra: Sequence[str] = (),
    class_names: Sequence[str] = (),
    progress: bool = True,
) -> Scores:
    """Scores of all samples.

    Raises:
        ValueError: a sample has no prediction, or one of another size.
    """
    missing = [name for name in samples.ids if name not in store]
    if missing:
        raise ValueError(f"{len(missing)} samples have no prediction, among them {missing[0]}; run once more")
    scores = Scores.for_task(task, extra, class_names)
    pairs = ((samples[i], store[name]) for i, name in enumerate(samples.ids))
    with tqdm(total=len(samples), desc="scoring", unit="sample", disable=not progress) as bar:
        for sample_list, predictions in _units(task, pairs):
            if task.answer == "classes":
                scores.add_image(sample_list, predictions)
            else:
                scores.add(sample_list[0], predictions[0])
            bar.update(len(sample_list))
    return scores


def _units(
    task: Task, pairs: Iterator[tuple[Sample, dict[str, Any]]]
) -> Iterator[tuple[list[Sample], list[dict[str, Any]]]]:
    """What is scored as one: a sample, or all classes of an image."""
    if task.answer != "classes":
        yield from (([sample], [prediction]) for sample, prediction in pairs)
        return
    for _, members in groupby(pairs, key=lambda pair: pair[0].group):
        chosen, predictions = zip(*members, strict=True)
        yield list(chosen), list(predictions)
