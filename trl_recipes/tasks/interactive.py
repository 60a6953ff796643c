"""COCO-Interactive: PSALM's released JSON, in which every instance of COCO val2017 has a prompt of four kinds."""

import json
from functools import partial

from processing.mask_inputs import load_mask

from ..metrics import box_of_mask
from .samples import Sample, Samples, open_rgb, prompt_picture, segmentation_rle
from .task import Source


def read(source: Source) -> Samples:
    """One sample for each instance that is no crowd and has a prompt; the split is the kind of prompt.

    A box is told in words, (x0, y0, x1, y1) in thousandths of width and height; the other prompts are shown as a
    black and white picture beside the image, as the model was trained.
    """
    samples = []
    for item in json.loads(source.file().read_text(encoding="utf-8")):
        info = item["image_info"]
        height, width = info["height"], info["width"]
        for annotation in item["anns"]:
            prompt = annotation.get(f"{source.split}_visual_prompt_mask")
            box = None if prompt is None else box_of_mask(load_mask(prompt))
            if annotation.get("iscrowd") or box is None:
                continue
            in_words = source.split == "box"
            samples.append(
                Sample(
                    id=f"{annotation['id']:015d}",
                    text=_box_text(box, height, width) if in_words else f"the object marked by the {source.split}",
                    load_image=partial(open_rgb, source.images / item["image"]),
                    load_mask=partial(segmentation_rle, [annotation["segmentation"]], height, width),
                    load_prompt=None if in_words else partial(prompt_picture, prompt),
                    kind=source.split,
                    group=str(info["id"]),
                )
            )
    return Samples.of(samples)


def _box_text(box: tuple[int, int, int, int], height: int, width: int) -> str:
    x0, y0, x1, y1 = (round(1000 * edge / side) for edge, side in zip(box, (width, height) * 2, strict=True))
    return f"the object in the box [{x0}, {y0}, {x1}, {y1}]"
