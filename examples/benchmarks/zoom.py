"""What following edges and zooming in are worth: the IoU with the truth by the size of things, and the time it takes.

    python examples/benchmarks/zoom.py --bank BANK --expressions 200
    python examples/benchmarks/zoom.py --bank BANK --model FOLDER --picture zoom.jpg --json zoom.json

Composed scenes of the test split are asked for things that are there, one request at a time, in three ways: masks as
they are drawn, following the edges of the image, and drawn again from nearer as well; an answer without mask counts 0.
The time runs from the image and the words to the mask, medians over the answers that drew. The picture shows, from top
to bottom, changes of the IoU evenly from the greatest gain to the greatest loss: left as drawn, right zoomed in.
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
from trl_recipes.evaluation.answers import draw, union
from trl_recipes.metrics.masks import count_overlap
from trl_recipes.picture_grid import picture_grid, save_picture

SIZES = ((0.0, 0.01), (0.01, 0.03), (0.03, 0.1), (0.1, 1.0))  # of things, as shares of the image
ROWS = 8  # of the picture
WAYS: dict[str, dict[str, Any]] = {
    "as drawn": {"follow_edges": False},
    "following edges": {"follow_edges": True},
    "and zooming in": {"follow_edges": True, "zoom": True},
}


def look(model: Any, processor: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Masks, IoUs and seconds of one request in each of the WAYS."""
    masks, seconds = [], []
    for options in WAYS.values():
        begin = time.perf_counter()
        masks.append(union(draw(model, processor, [sample], **options)[0]))
        seconds.append(time.perf_counter() - begin)
    ious = [count_overlap(mask, sample["mask"]).iou for mask in masks]
    return {"masks": masks, "ious": ious, "seconds": seconds, "area": sample["mask"].mean()}


def measure(looks: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean IoUs, of all and by size, and median seconds, each a list in the order of the WAYS."""
    drew = [look for look in looks if look["masks"][0] is not None]
    if not drew:
        raise SystemExit("the model drew nothing: there is nothing to compare")
    rows = []
    for low, high in (*SIZES, (0.0, 1.0)):
        ious = np.array([look["ious"] for look in looks if low < look["area"] <= high])
        if len(ious):
            rows.append({"above": low, "up_to": high, "count": len(ious), "iou": ious.mean(0).tolist()})
    seconds = np.median([look["seconds"] for look in drew], axis=0).tolist()
    return {"asked": len(looks), "drew": len(drew), "ways": list(WAYS), "sizes": rows, "seconds": seconds}


def show(samples: list[dict[str, Any]], looks: list[dict[str, Any]]) -> Any:
    """Some of the changes as a picture, from the greatest gain to the greatest loss."""
    changed = [i for i, look in enumerate(looks) if look["ious"][0] != look["ious"][-1]]
    changed.sort(key=lambda i: looks[i]["ious"][0] - looks[i]["ious"][-1])
    places = np.linspace(0, max(len(changed) - 1, 0), min(ROWS, len(changed))).round().astype(int)
    lines = []
    for i in (changed[place] for place in places):
        sample, look = samples[i], looks[i]
        for way in (0, -1):
            words = f"{list(WAYS)[way]}: IoU {look['ious'][way]:.2f}"
            lines.append((sample["image"], sample["text"], sample["mask"], look["masks"][way], words))
    return picture_grid(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_scene_arguments(parser)
    parser.add_argument("--picture", type=Path, help="write a picture of some changes to this file")
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = make_parser().parse_args(arguments)
    model, processor, samples = open_scenes(args)
    looks = [look(model, processor, sample) for sample in tqdm(samples, desc="drawing")]
    found = measure(looks)
    first, *others = found["seconds"]
    ratios = [f"{way} {value / first:.2f}x" for way, value in zip(found["ways"][1:], others, strict=True)]
    print(f"{found['asked']} requests, {found['drew']} drawn; {first:.3f} s a mask, {', '.join(ratios)}\n")
    print(f"| size of the thing | requests | {' | '.join(found['ways'])} |\n|---|---|{'---|' * len(found['ways'])}")
    for row in found["sizes"]:
        size = f"{row['above']:.0%} to {row['up_to']:.0%} of the image"
        print(f"| {size} | {row['count']} | {' | '.join(f'{iou:.3f}' for iou in row['iou'])} |")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.picture is not None:
        save_picture(show(samples, looks), args.picture)
    return found


if __name__ == "__main__":
    main()
