"""Zooming in: every mask is drawn again from nearer, and comes out finer. Not in the paper.

A mask has the resolution of the visual tokenizer's picture, so a small thing gets a few cells of it. Here the image is
cut out around what was drawn, a little wider and wider still, and the model is asked for the same in both of these
views. It does not begin anew there: the coarse scales are those of the first mask, which says which thing is meant
(`picture_prefix` of `generate`); the model adds the finer ones. What the views say is averaged.

    answers = processor.post_process_segmentation(outputs, images=images, follow_edges=False)
    answers = zoom_in(model, processor, conversations, answers)

The model goes on best from masks as it drew them; whether they follow the edges of the image is for the end.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from .conversation_argenseg import collect_contents, with_image
from .edges import EdgeGuide
from .image_inputs import load_images
from .segmentation_processing import check_threshold

WIDER = (1.4, 1.7)  # sides of the views, by the longer side of the box around the mask
SMALLEST = 3 / 16  # least side of a view, by the longer side of the image
COARSE = 1 / 4  # scales are given up to this part of the last one's side
AGREE = 0.15  # least IoU with the first mask: below, the views show something else, and the first mask stays
VIEWS_TOGETHER = 8
# options of `generate` that are tied to the whole image, or do not go with a given answer and prefix
UNFIT = ("encoded_image", "pixel_values", "mm_encoder_outputs", "negative_input_ids", "prefill_chunk_size", "streamer")
LIMITED = {"picture_guidance_scale": 0, "num_return_sequences": 1}  # and the only values of these that do

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
MaskKey = tuple[int, int]  # the answer, and which of its segments


@dataclass(frozen=True)
class View:
    """One look at one mask, segment `mask[1]` of answer `mask[0]`, and where in the image it looks."""

    mask: MaskKey
    box: Box


@torch.no_grad()
def zoom_in(
    model: Any,
    processor: Any,
    conversations: Sequence[list[dict[str, Any]]],
    answers: Sequence[dict[str, Any]],
    threshold: float = 0.5,
    batch_size: int = VIEWS_TOGETHER,
    follow_edges: bool | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Answers with their masks drawn again from nearer.

    Args:
        model: an `ARGenSegForConditionalGeneration`.
        processor: its `ARGenSegProcessor`.
        conversations: what was asked, one for each answer, with one image each. The words are asked again of the views,
            as they are: requests by coordinates, which mean other places there, are not for zooming in.
        answers: what `post_process_segmentation` returned for them, masks of the size of the upright image that do not
            yet follow its edges (with edges, gIoU was 0.648 in place of 0.655 on 160 validation expressions).
        threshold: see `decode_masks`.
        batch_size: views that are drawn together; a mask has two.
        follow_edges: whether the new masks follow the edges of the image, see `decode_masks`. Default: as the
            processor says.
        options: of `generate`.

    Returns:
        the answers with new masks. A mask stays, but for the edges, if it is empty, if it reaches so far that both
        views would be the whole image, or if they do not show what it shows. Texts, labels and scores are those of the
        first look.

    Raises:
        ValueError: a conversation does not hold exactly one image, or holds masks; a mask has another size than its
            image; an option asks for something that views cannot have, see `check_zoom_options`.
    """
    check_zoom_options(model, options)
    check_threshold(threshold)
    images = _images_of(conversations, answers)
    follow_edges = processor.follow_edges if follow_edges is None else follow_edges
    views = list(_views(images, answers))
    waited_for = Counter(view.mask for view in views)
    seen: dict[MaskKey, list[tuple[Box, np.ndarray]]] = {}
    finer: dict[MaskKey, np.ndarray] = {}
    for start in range(0, len(views), batch_size):
        together = views[start : start + batch_size]
        maps = _look(model, processor, conversations, images, answers, together, follow_edges, options)
        for view, white in zip(together, maps, strict=True):
            seen.setdefault(view.mask, []).append((view.box, white))
            if len(seen[view.mask]) == waited_for[view.mask]:
                finer[view.mask] = _average(seen.pop(view.mask), images[view.mask[0]].size[::-1]) > threshold
    guides = {number: partial(processor.edge_guide, image) for number, image in images.items() if follow_edges}
    return [_answer_with(finer, number, answer, guides.get(number)) for number, answer in enumerate(answers)]


def check_zoom_options(model: Any, options: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: options of `generate` that views cannot have: previews (`picture_stop_at_scale`), guidance
            (`picture_guidance_scale`), several answers to a request, or what belongs to the whole image.
    """
    set_to = {name: generate_option(model, options, name) for name in (*UNFIT, *LIMITED, "picture_stop_at_scale")}
    if set_to["picture_stop_at_scale"] is not None:
        raise ValueError("zooming in needs whole pictures: leave out picture_stop_at_scale, or do not zoom")
    unfit = [name for name in UNFIT if set_to[name] is not None]
    unfit += [name for name, plain in LIMITED.items() if (set_to[name] or plain) != plain]
    if unfit:
        raise ValueError(f"{', '.join(unfit)} cannot be used to zoom in: every view is an image and a row of its own")


def generate_option(model: Any, options: dict[str, Any], name: str) -> Any:
    """What `generate(**options)` takes for one of them: given by name, in a configuration, or set for the model."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def boxes_around(mask: np.ndarray) -> list[Box]:
    """Views of a mask (H, W): squares around it, shifted to lie in the image and cut where they are larger.

    None if the mask is empty; no view is the whole image, and none is there twice.
    """
    if not mask.any():
        return []
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    spans = [(columns[0], columns[-1] + 1, mask.shape[1]), (rows[0], rows[-1] + 1, mask.shape[0])]
    longer = max(end - start for start, end, _ in spans)
    boxes = []
    for wider in WIDER:
        side = round(max(wider * longer, SMALLEST * max(mask.shape)))
        (left, right), (top, bottom) = (_inside((start + end) / 2, side, limit) for start, end, limit in spans)
        if (right - left, bottom - top) != mask.shape[::-1]:
            boxes.append((left, top, right, bottom))
    return list(dict.fromkeys(boxes))


def _inside(middle: float, side: int, limit: int) -> tuple[int, int]:
    """A span of `side` around `middle`, moved and cut to lie within 0 and `limit`."""
    side = max(1, min(side, limit))
    start = min(max(round(middle - side / 2), 0), limit - side)
    return start, start + side


def _views(images: dict[int, Image.Image], answers: Sequence[dict[str, Any]]) -> Iterator[View]:
    for number, image in images.items():
        for place, segment in enumerate(answers[number]["segments"]):
            if segment["mask"].shape != image.size[::-1]:
                raise ValueError(
                    f"answer {number}: a mask of {segment['mask'].shape} (height, width) on an image of "
                    f"{image.size[::-1]}; pass images= and follow_edges=False to post_process_segmentation"
                )
            for box in boxes_around(segment["mask"]):
                yield View((number, place), box)


def _look(
    model: Any,
    processor: Any,
    conversations: Sequence[list[dict[str, Any]]],
    images: dict[int, Image.Image],
    answers: Sequence[dict[str, Any]],
    views: list[View],
    follow_edges: bool,
    options: dict[str, Any],
) -> list[np.ndarray]:
    """What the model draws in each view: maps in [0, 1] of the views' sizes."""
    asked, masks, crops = [], [], []
    for view in views:
        (answer, segment), (left, top, right, bottom) = view.mask, view.box
        crops.append(images[answer].crop(view.box))
        asked.append(with_image(conversations[answer], crops[-1]))
        masks.append(answers[answer]["segments"][segment]["mask"][top:bottom, left:right])
    inputs = processor.apply_chat_template(asked, tokenize=True, return_dict=True, add_generation_prompt=True)
    given = {"picture_prefill": "always"}
    if len(processor.whole_scales) > 1:
        coarse = processor.encode_masks(masks, search_steps=0)[:, : _given_tokens(processor)]
        given["picture_prefix"] = coarse.to(model.device)
    if options.get("picture_answer_ids") is None:
        given["picture_answer_ids"] = processor.picture_answer_ids
    outputs = model.generate(**inputs.to(model.device, model.dtype), **options | given)
    pictures = processor.read_pictures(outputs, prompt_length=inputs["input_ids"].shape[1])
    codes = torch.stack([row[0] for row in pictures])
    return processor.decode_masks(codes, images=crops, follow_edges=follow_edges)[0]


def _average(seen: list[tuple[Box, np.ndarray]], size: tuple[int, int]) -> np.ndarray:
    """At every place the mean of the views that show it, 0 where none does: a map of the `size` (height, width)."""
    total, count = np.zeros(size, np.float32), np.zeros(size, np.uint8)
    for (left, top, right, bottom), white in seen:
        total[top:bottom, left:right] += white
        count[top:bottom, left:right] += 1
    return np.divide(total, count, out=total, where=count > 0)


def _given_tokens(processor: Any) -> int:
    """Tokens of the scales that are given: the first, and all up to COARSE of the last one's side."""
    sides = processor.visual_tokenizer.config.patch_nums[: len(processor.whole_scales)]
    given = sum(side <= COARSE * sides[-1] for side in sides)
    return processor.whole_scales[max(given, 1) - 1]


def _answer_with(
    finer: dict[MaskKey, np.ndarray],
    number: int,
    answer: dict[str, Any],
    make_guide: Callable[[], EdgeGuide] | None = None,
) -> dict[str, Any]:
    segments = []
    for place, segment in enumerate(answer["segments"]):
        first, mask = segment["mask"], finer.get((number, place))
        if mask is None or (first & mask).sum() < AGREE * (first | mask).sum():
            mask = first if make_guide is None else make_guide().follow(first, 0.5) > 0.5
        segments.append(segment | {"mask": mask})
    return answer | {"segments": segments}


def _images_of(
    conversations: Sequence[list[dict[str, Any]]], answers: Sequence[dict[str, Any]]
) -> dict[int, Image.Image]:
    """The images of those conversations that have masks to look at, each read once."""
    sources: dict[int, Any] = {}
    for number, (conversation, answer) in enumerate(zip(conversations, answers, strict=True)):
        if not answer["segments"]:
            continue
        (found,), *_, extra = collect_contents([conversation])
        if len(found) != 1 or extra:
            masks = " and masks" if extra else ""
            raise ValueError(
                f"zooming in needs conversations with one image each, and no masks; got one with {len(found)}{masks}"
            )
        sources[number] = found[0]
    read: list[Any] = load_images(sources.values())
    return dict(zip(sources, read, strict=True))
