"""A tiny data set of one's own: two pictures with a square and a disc each, in every format that is read.

The things do not stand where the model of toy.py knows them, so that there is something to learn.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

import trl_recipes

CONFIGS = Path(trl_recipes.__file__).parent / "configs"
STEPS = 30
HEIGHT, WIDTH = 40, 60
PROMPTS = {"square": "the square", "disc": "the ball, on the left"}
ABSENT = "the whale"
SQUARE = [[36.0, 11.0, 55.0, 11.0, 55.0, 30.0, 36.0, 30.0]]  # COCO: x1, y1, x2, y2, ...


def masks() -> dict[str, np.ndarray]:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return {"square": (x > 35) & (x < 55) & (y > 10) & (y < 30), "disc": np.hypot(x - 15, y - 20) < 11}


def photograph(number: int) -> Image.Image:
    pixels = np.full((HEIGHT, WIDTH, 3), 200 - 20 * number, np.uint8)
    pixels[masks()["square"]] = (200, 30, 30)
    pixels[masks()["disc"]] = (30, 30, 200)
    return Image.fromarray(pixels)


def rle(mask: np.ndarray) -> dict[str, Any]:
    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [HEIGHT, WIDTH], "counts": found["counts"].decode()}


def write_pictures(folder: Path) -> Path:
    """`images/0.png`, `images/1.png` and `masks/<number>_<thing>.png`."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(2):
        photograph(number).save(folder / f"images/{number}.png")
        for thing, mask in masks().items():
            Image.fromarray(mask).save(folder / f"masks/{number}_{thing}.png")
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(kind: str = "path") -> list[dict[str, Any]]:
    """Six rows: in each picture the square, the disc, and what is not there; masks as `path`, `rle` or `polygons`."""
    found: list[dict[str, Any]] = []
    for number in range(2):
        values = {
            "path": {thing: f"masks/{number}_{thing}.png" for thing in PROMPTS},
            "rle": {thing: rle(mask) for thing, mask in masks().items()},
            "polygons": {"square": SQUARE, "disc": rle(masks()["disc"])},
        }[kind]
        for thing, prompt in PROMPTS.items():
            found.append({"image": f"images/{number}.png", "prompt": prompt, "mask": values[thing]})
        found.append({"image": f"images/{number}.png", "prompt": ABSENT, "mask": None if number else []})
    return found


def as_jsonl(folder: Path, kind: str = "path") -> Path:
    return write_jsonl(write_pictures(folder) / "train.jsonl", rows(kind))


def as_csv_folder(folder: Path) -> Path:
    write_pictures(folder)
    with (folder / "prompts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt", "mask"])
        writer.writerows([row["image"], row["prompt"], row["mask"] or ""] for row in rows())
    return folder


def as_metadata_folder(folder: Path) -> Path:
    """`metadata.jsonl` as `imagefolder` has it; the masks are called like the images."""
    write_pictures(folder)
    for number in range(2):
        (folder / f"masks/{number}_disc.png").rename(folder / f"masks/{number}.png")
    lines = [{"file_name": f"{number}.png", "text": PROMPTS["disc"]} for number in range(2)]
    write_jsonl(folder / "metadata.jsonl", lines)
    return folder


def coco() -> dict[str, Any]:
    """Two categories; two squares make one mask of the first picture, the second has only a disc."""
    disc = rle(masks()["disc"])
    uncompressed = {"size": disc["size"], "counts": runs(masks()["disc"])}
    small = [[50.0, 0.0, 58.0, 0.0, 58.0, 6.0, 50.0, 6.0]]
    return {
        "images": [{"id": 7 + n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for n in range(2)],
        "categories": [{"id": 1, "name": "square"}, {"id": 3, "name": "ball"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "segmentation": SQUARE, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 1, "segmentation": small, "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 3, "segmentation": disc, "iscrowd": 0},
            {"id": 4, "image_id": 8, "category_id": 3, "segmentation": uncompressed, "iscrowd": 1},
        ],
    }


def runs(mask: np.ndarray) -> list[int]:
    """Uncompressed RLE: lengths of zeros and ones in turn, column by column."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, len(flat)]).tolist()
    return [0, *lengths] if flat[0] else lengths


def as_coco(folder: Path, content: dict[str, Any] | None = None) -> Path:
    path = write_pictures(folder) / "annotations.json"
    path.write_text(json.dumps(coco() if content is None else content))
    return path


def conversation_rows() -> list[dict[str, Any]]:
    """As the released project writes them: two masks in one answer; a mask in the history; words alone."""

    def row(masks: Any, *turns: str) -> dict[str, Any]:
        told = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        return {"image": "images/0.png", "mask": masks, "conversations": told, "dataset": "own"}

    square, disc = "masks/0_square.png", "masks/0_disc.png"
    return [
        row([square, disc], "<image>\n Please segment both.", "results are: <mask><mask>."),
        row([square, disc], "<image>\nThe square?", "Here: <mask>.", "And the ball?", "Sure, <mask>."),
        row([], "<image>\nIs there a whale?", "No."),
        row(disc, " Please segment ball in this image.", "Sure, the segmentation result: <mask>."),
    ]


def as_conversations(folder: Path) -> Path:
    return write_jsonl(write_pictures(folder) / "released.jsonl", conversation_rows())


def trl_command(config: str, model: Path, data: Path, output: Path, /, **changes: Any) -> list[str]:
    """Arguments of one of TRL's recipes that learns these requests by heart."""
    options = dict(
        config=CONFIGS / f"{config}.yaml", model_name_or_path=model, data=data, eval_data=data, output_dir=output,
        max_steps=STEPS, eval_steps=STEPS, save_steps=STEPS // 2, warmup_steps=1, per_device_train_batch_size=6,
        learning_rate=1e-2, logging_steps=1, use_cpu=True, disable_tqdm=True, cache_dir=data.parent / "cache",
    )  # fmt: skip
    return [str(word) for name, value in (options | changes).items() for word in (f"--{name}", value)]
