"""Validation of a model on rows of `load_mask_data`: every request is answered freely, and the masks are compared."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from processing import load_image

from .evaluation.answers import answer, union
from .mask_data import conversation_of, target_masks
from .mask_data.mask_values import union_of
from .metrics import SegmentationMetrics
from .picture_grid import picture_grid


def answer_rows(model: Any, processor: Any, rows: Sequence[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Answers (`text`, `segments`) to the last request of each row, as one batch; `options` are those of `answer`."""
    images = [load_image(row["image"]) for row in rows]
    requests = [conversation_of(processor, row, image)[:-1] for row, image in zip(rows, images, strict=True)]
    return answer(model, processor, requests, images, [row["prompt"] for row in rows], **options)


def evaluate_rows(
    model: Any,
    processor: Any,
    rows: Any,
    batch_size: int = 16,
    shown: int = 8,
    progress: bool = True,
    **options: Any,
) -> tuple[dict[str, float], Image.Image]:
    """Metrics (see `SegmentationMetrics`) over all rows, and a picture grid of some of them.

    Args:
        shown: how many rows, evenly spread, are in the grid.
        options: of `answer`; default is the model's generation configuration, its logit adjustment included.
    """
    was_training = model.training
    model.eval()
    metrics, lines = SegmentationMetrics(), []
    picked = {round(i) for i in np.linspace(0, len(rows) - 1, min(shown, len(rows)))}
    with tqdm(total=len(rows), desc="drawing", disable=not progress, leave=False) as bar:
        for start in range(0, len(rows), batch_size):
            batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            answers = answer_rows(model, processor, batch, **options)
            for number, (row, found) in enumerate(zip(batch, answers, strict=True), start=start):
                truth, drawn = union_of(target_masks(row), row["image_size"]), union(found)
                iou = metrics.add(drawn, truth)
                if number in picked:
                    caption = f"IoU {iou:.2f}" if drawn is not None else found["text"] or "(nothing)"
                    lines.append((row["image"], row["prompt"], truth, drawn, caption))
            bar.update(len(batch))
    model.train(was_training)
    return metrics.compute(), picture_grid(lines)
