"""A model's answers: texts and masks of a batch of requests, generated freely."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from processing import load_image, zoom_in
from processing.zoom import check_zoom_options

from ..metrics import SegmentationMetrics


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    conversations: Sequence[list[dict[str, Any]]],
    images: Sequence[Any],
    labels: Sequence[str],
    zoom: bool = False,
    follow_edges: bool | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Answers (`text`, `segments`) to conversations, as one batch.

    Args:
        images: what the masks of each are of.
        labels: what the masks of each are called.
        zoom: whether masks are drawn again from nearer, see `zoom_in`.
        follow_edges: whether masks follow the edges of their image, see `decode_masks`.
        options: of `generate`.
    """
    if zoom:
        check_zoom_options(model, options)
    inputs = processor.apply_chat_template(
        list(conversations), tokenize=True, return_dict=True, add_generation_prompt=True
    ).to(model.device, model.dtype)
    outputs = model.generate(**inputs, return_dict_in_generate=True, **options)
    answers = processor.post_process_segmentation(
        outputs,
        images=list(images),
        labels=list(labels),
        prompt_length=inputs["input_ids"].shape[1],
        follow_edges=False if zoom else follow_edges,
    )
    if not zoom:
        return answers
    return zoom_in(model, processor, conversations, answers, follow_edges=follow_edges, **options)


def draw(model: Any, processor: Any, samples: Sequence[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Answers to the segmentation requests of samples with `image` (PIL) and `text`, as one batch."""
    images = [load_image(sample["image"]) for sample in samples]
    conversations = [
        processor.build_segmentation_conversation(image, sample["text"])
        for image, sample in zip(images, samples, strict=True)
    ]
    return answer(model, processor, conversations, images, [s["text"] for s in samples], **options)


def union(answer: dict[str, Any]) -> np.ndarray | None:
    """All masks of an answer as one (H, W); None where nothing was drawn."""
    masks = [segment["mask"] for segment in answer["segments"]]
    return np.logical_or.reduce(masks) if masks else None


def evaluate_expressions(
    model: Any, processor: Any, samples: Any, batch_size: int = 32, progress: bool = False, **options: Any
) -> dict[str, float]:
    """Metrics over samples with `image`, `text`, `kind` and `mask` (H, W), in memory; see `SegmentationMetrics`.

    `options` are those of `answer`.
    """
    model.eval()
    metrics = SegmentationMetrics()
    for start in tqdm(range(0, len(samples), batch_size), desc="drawing", disable=not progress):
        batch = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        for sample, found in zip(batch, draw(model, processor, batch, **options), strict=True):
            metrics.add(union(found), sample["mask"], sample["kind"])
    return metrics.compute()
