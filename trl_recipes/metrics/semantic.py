"""Mean IoU of label maps from the confusion matrix of the whole set."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from processing.image_inputs import open_image, to_numpy

from .accumulator import Accumulator, Record, exact_mean


def load_labels(source: Any) -> np.ndarray:
    """A label map (H, W) of int64 from an integer array or tensor, a PIL image (its indices or greys) or a path."""
    if isinstance(source, (str, bytes)) or hasattr(source, "__fspath__"):
        source = open_image(source)
    if isinstance(source, Image.Image):
        if source.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"a label map has one channel of integers; this picture's mode is {source.mode}")
        source = np.asarray(source)
    if not isinstance(source, (np.ndarray, torch.Tensor)):
        raise TypeError(f"a label map must be an integer array or tensor or a PIL image, not {type(source).__name__}")
    array = to_numpy(source)
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_):
        raise ValueError(f"a label map must be integers (H, W); got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64, copy=False)


class SemanticIoU(Accumulator):
    """Pixels by true and predicted class over the whole set, and what follows from them.

    Pixels whose truth is `ignore_label` are dropped. A prediction that is no class (the ignore label, or any number
    outside 0..num_classes-1) on another pixel is a miss of its true class; it is not dropped. `miou` is the mean IoU of
    the classes that have true pixels: predictions of a class that the set lacks lower the IoU of others only.
    `miou_any` takes in those classes too, with IoU 0. IoU is never averaged over images.

    Args:
        num_classes: labels are 0 .. num_classes - 1.
        ignore_label: None if every label counts.
        names: of the classes, for `iou_<name>`; their numbers by default.
    """

    columns = ("cells", "counts", "kind")

    def __init__(self, num_classes: int, ignore_label: int | None = 255, names: Sequence[str] | None = None) -> None:
        names = [str(index) for index in range(num_classes)] if names is None else list(names)
        if num_classes < 1 or len(names) != num_classes or len(set(names)) != num_classes:
            raise ValueError(f"{num_classes} classes need as many different names; got {len(names)}")
        super().__init__(num_classes=num_classes, ignore_label=ignore_label, names=names)
        self.num_classes, self.ignore_label, self.names = num_classes, ignore_label, names

    def add(self, prediction: Any, truth: Any, kind: str = "", sample_id: str | int | None = None) -> float:
        """Counts one image and returns its share of right pixels (1 if all are ignored).

        Args:
            prediction, truth: label maps (H, W) of one size; see `load_labels`.

        Raises:
            ValueError: sizes differ, or the truth holds a label that is neither a class nor `ignore_label`.
        """
        prediction, truth = load_labels(prediction), load_labels(truth)
        if prediction.shape != truth.shape:
            raise ValueError(f"the prediction is {prediction.shape}, the truth {truth.shape}: resize the prediction")
        if self.ignore_label is not None:
            kept = truth != self.ignore_label
            prediction, truth = prediction[kept], truth[kept]
        known = (truth >= 0) & (truth < self.num_classes)
        if not known.all():
            raise ValueError(
                f"the truth holds the label {int(truth[~known][0])}; classes are 0 to {self.num_classes - 1}, "
                f"ignored is {self.ignore_label}"
            )
        void = (prediction < 0) | (prediction >= self.num_classes)
        cells = truth * (self.num_classes + 1) + np.where(void, self.num_classes, prediction)
        counts = np.bincount(cells.ravel())
        found = counts.nonzero()[0]
        record = (found.tolist(), counts[found].tolist(), kind)
        self._store(record, sample_id)
        return self._value(record)

    def _value(self, record: Record) -> float:
        right = sum(n for cell, n in zip(*record[:2], strict=True) if cell % (self.num_classes + 2) == 0)
        return right / sum(record[1]) if record[1] else 1.0

    def confusion(self) -> np.ndarray:
        """Pixels (num_classes, num_classes + 1) by true (row) and predicted class; the last column is "no class"."""
        return self._matrix(self._table(self._records()))

    def _matrix(self, table: dict[str, np.ndarray]) -> np.ndarray:
        matrix = np.zeros(self.num_classes * (self.num_classes + 1), np.int64)
        cells = np.concatenate([np.asarray(one, np.int64) for one in table["cells"]])
        counts = np.concatenate([np.asarray(one, np.int64) for one in table["counts"]])
        np.add.at(matrix, cells, counts)
        return matrix.reshape(self.num_classes, self.num_classes + 1)

    def _measure(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        """`miou`, `miou_any`, `pixel_accuracy`, `mean_accuracy`, `fwiou`, `classes`, `count`, `iou_<name>`.

        Left out: `iou_<name>` of a class without true pixels, and all but the counts where every pixel is ignored.
        """
        matrix = self._matrix(table)
        right, true = np.diagonal(matrix).copy(), matrix.sum(1)
        predicted = matrix[:, :-1].sum(0)
        union = true + predicted - right
        present, total = true > 0, int(true.sum())
        result: dict[str, float] = {"classes": int(present.sum()), "count": len(table["cells"])}
        if not total:
            return result
        ious = right[present] / union[present]
        result |= {
            "miou": exact_mean(ious),
            "miou_any": exact_mean(right[union > 0] / union[union > 0]),
            "pixel_accuracy": int(right.sum()) / total,
            "mean_accuracy": exact_mean(right[present] / true[present]),
            "fwiou": math.fsum((ious * true[present]).tolist()) / total,
        }
        names = (self.names[index] for index in np.flatnonzero(present))
        return result | {f"iou_{name}": float(iou) for name, iou in zip(names, ious, strict=True)}
