"""What zooming in is worth: the IoU with the truth by the size of things, with and without, and the time it takes.

    python examples/benchmarks/zoom.py --bank BANK --expressions 200
    python examples/benchmarks/zoom.py --bank BANK --model FOLDER --picture zoom.jpg --json zoom.json

Composed scenes of the test split are asked for things that are there, one request at a time, first as they are and then
with `zoom_in` on the answers; an answer without a mask counts 0 both times. The time runs from the image and the words
to the mask, medians over the answers that drew. The picture shows, from top to bottom, changes of the IoU evenly from
the greatest gain to the greatest loss: left as it was, right zoomed in.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.scene_requests import add_scene_arguments, open_scenes
from processing import zoom_in
from trl_recipes.evaluation.answers import draw, union
from trl_recipes.metrics.masks import count_overlap
from trl_recipes.picture_grid import picture_grid, save_picture

SIZES = ((0.0, 0.01), (0.01, 0.03), (0.03, 0.1), (0.1, 1.0))  # of things, as shares of the image
ROWS = 8  # of the picture


def look_twice(model: Any, processor: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Masks and IoUs of one answer without and with zooming in, and the seconds of each."""
    begin = time.perf_counter()
    answers = draw(model, processor, [sample])
    first = time.perf_counter()
    asked = [processor.build_segmentation_conversation(sample["image"], sample["text"])]
    finer = zoom_in(model, processor, asked, answers)
    end = time.perf_counter()
    masks = [union(answers[0]), union(finer[0])]
    ious = [count_overlap(mask, sample["mask"]).iou for mask in masks]
    return {"masks": masks, "ious": ious, "seconds": [first - begin, end - begin], "area": sample["mask"].mean()}


def measure(looks: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean IoUs, of all and by size, and median seconds."""
    drew = [look for look in looks if look["masks"][0] is not None]
    if not drew:
        raise SystemExit("the model drew nothing: there is nothing to compare")
    rows = []
    for low, high in (*SIZES, (0.0, 1.0)):
        ious = np.array([look["ious"] for look in looks if low < look["area"] <= high])
        if len(ious):
            plain, zoomed = ious.mean(0).tolist()
            rows.append({"above": low, "up_to": high, "count": len(ious), "plain": plain, "zoomed": zoomed})
    plain, zoomed = np.median([look["seconds"] for look in drew], axis=0).tolist()
    return {"asked": len(looks), "drew": len(drew), "sizes": rows, "seconds": plain, "seconds_zoomed": zoomed}


def show(samples: list[dict[str, Any]], looks: list[dict[str, Any]]) -> Any:
    """Some of the changes as a picture, from the greatest gain to the greatest loss."""
    changed = [i for i, look in enumerate(looks) if look["ious"][0] != look["ious"][1]]
    changed.sort(key=lambda i: looks[i]["ious"][0] - looks[i]["ious"][1])
    places = np.linspace(0, max(len(changed) - 1, 0), min(ROWS, len(changed))).round().astype(int)
    lines = []
    for i in (changed[place] for place in places):
        sample, look = samples[i], looks[i]
        for mask, value, words in zip(look["masks"], look["ious"], ("as it was", "zoomed in"), strict=True):
            lines.append((sample["image"], sample["text"], sample["mask"], mask, f"{words}: IoU {value:.2f}"))
    return picture_grid(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_scene_arguments(parser)
    parser.add_argument("--picture", type=Path, help="write a picture of some changes to this file")
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = make_parser().parse_args(arguments)
    model, processor, samples = open_scenes(args)
    looks = [look_twice(model, processor, sample) for sample in tqdm(samples, desc="drawing")]
    found = measure(looks)
    ratio = found["seconds_zoomed"] / found["seconds"]
    print(
        f"{found['asked']} requests, {found['drew']} drawn; {found['seconds']:.3f} s a mask, zooming in {ratio:.1f}x\n"
    )
    print("| size of the thing | requests | mean IoU | zooming in |\n|---|---|---|---|")
    for row in found["sizes"]:
        size = f"{row['above']:.0%} to {row['up_to']:.0%} of the image"
        print(f"| {size} | {row['count']} | {row['plain']:.3f} | {row['zoomed']:.3f} |")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.picture is not None:
        save_picture(show(samples, looks), args.picture)
    return found


if __name__ == "__main__":
    main()
