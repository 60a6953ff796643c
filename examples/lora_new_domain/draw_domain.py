"""Draws a small data set of one's own: pictures of land from the air, with masks of the lakes.

Forests, fields, solar parks and towns are in the way; one picture in eight has no lake.

    python examples/lora_new_domain/draw_domain.py --output outputs/land

writes the folders `train` (64 pictures) and `validation` (32), each with `images/`, `masks/` and a `prompts.csv`
(image, prompt, mask; no mask: the thing is not in the picture), which is the layout that `trl_recipes.lora` reads.
Nothing is downloaded, and the same seed always gives the same pictures. Replace it by your own pictures and masks.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 256
THINGS = ("lake", "forest", "wheat", "soil", "solar park", "town")
ASKED = {"lake": "the lake"}
ABSENT_SHARE = 1 / 8


def noise(rng: np.random.Generator, blur: float, strength: float) -> np.ndarray:
    """Soft random spots (SIDE, SIDE, 1) with this standard deviation."""
    spots = Image.fromarray(rng.integers(0, 255, (SIDE, SIDE), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(blur))
    values = np.asarray(spots, dtype=np.float32)
    return ((values - values.mean()) / (values.std() + 1e-6) * strength)[..., None]


def ground(rng: np.random.Generator, colour: tuple[int, int, int], coarse: float, fine: float) -> np.ndarray:
    """A surface (SIDE, SIDE, 3) of a colour, uneven at two sizes."""
    base = np.array(colour, dtype=np.float32) + rng.normal(0, 6, 3)
    return base + noise(rng, 12, coarse) + noise(rng, 1.2, fine)


def stripes(rng: np.random.Generator, distance: float, width: float) -> np.ndarray:
    """Parallel lines (SIDE, SIDE) bool at a random angle."""
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:SIDE, :SIDE]
    return (x * np.cos(angle) + y * np.sin(angle)) % distance < width


def surface(rng: np.random.Generator, thing: str) -> np.ndarray:
    """How a thing looks from above (SIDE, SIDE, 3)."""
    if thing == "lake":
        return ground(rng, (38, 72, 104), 4, 1.5)
    if thing == "forest":
        return ground(rng, (30, 66, 34), 6, 1) + noise(rng, 2.2, 16)
    if thing == "wheat":
        lines = stripes(rng, 9, 2)[..., None]
        return ground(rng, (206, 176, 92), 6, 5) - 18 * lines
    if thing == "soil":
        lines = stripes(rng, 7, 3)[..., None]
        return ground(rng, (122, 86, 62), 7, 5) - 14 * lines
    if thing == "solar park":
        panels = stripes(rng, 11, 7)[..., None]
        return np.where(panels, ground(rng, (24, 30, 58), 3, 2), ground(rng, (150, 150, 140), 4, 4))
    return roofs(rng)


def roofs(rng: np.random.Generator) -> np.ndarray:
    """Houses along streets (SIDE, SIDE, 3)."""
    plan = Image.new("RGB", (SIDE, SIDE), (148, 146, 142))
    draw = ImageDraw.Draw(plan)
    for top in range(-8, SIDE, 20):
        for left in range(-8, SIDE, 18):
            x, y = left + int(rng.integers(0, 5)), top + int(rng.integers(0, 5))
            roof = [(178, 84, 62), (160, 96, 80), (116, 104, 104), (196, 188, 180)][rng.integers(4)]
            draw.rectangle((x + 2, y + 2, x + 12, y + 13), fill=(84, 84, 84))
            draw.rectangle((x, y, x + 10, y + 11), fill=roof)
    return np.asarray(plan, dtype=np.float32) + noise(rng, 1, 4)


def outline(rng: np.random.Generator, thing: str, centre: np.ndarray, radius: float) -> np.ndarray:
    """The area of a thing (SIDE, SIDE) bool: fields have straight borders, lakes, forests and towns do not."""
    canvas = Image.new("1", (SIDE, SIDE))
    if thing in ("lake", "forest", "town"):
        angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        waves = sum(rng.normal(0, 0.28 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 6))
        reach = radius * np.clip(1 + waves, 0.45, 1.6)
        points = centre + np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=1)
    else:
        tilt, shape = rng.uniform(0, np.pi), radius * np.array([rng.uniform(0.8, 1.2), rng.uniform(0.6, 1.0)])
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * shape + rng.normal(0, radius * 0.12, (4, 2))
        turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
        points = centre + corners @ turn.T
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points.tolist()], fill=1)
    return np.asarray(canvas)


def draw_road(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """The picture with a road across it; nobody asks for roads."""
    canvas = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    start, end = rng.uniform(0, SIDE, 2)
    ends = [(0, start), (SIDE, end)] if rng.random() < 0.5 else [(start, 0), (end, SIDE)]
    ImageDraw.Draw(canvas).line(ends, fill=(186, 180, 168), width=int(rng.integers(3, 6)))
    return np.asarray(canvas, dtype=np.float32)


def draw_land(seed: int) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """One picture, and for each thing in it the part of its area (SIDE, SIDE) bool that is seen."""
    rng = np.random.default_rng(seed)
    pixels = draw_road(rng, ground(rng, (112, 138, 74), 9, 4))
    others = rng.permutation([thing for thing in THINGS if thing not in ASKED])[: rng.integers(1, 4)]
    asked = [thing for thing in ASKED if rng.random() >= ABSENT_SHARE]
    things = rng.permutation([*others, *asked])
    quarters = rng.permutation([(0, 0), (0, 1), (1, 0), (1, 1)])[: len(things)]
    masks: dict[str, np.ndarray] = {}
    for thing, quarter in zip(things.tolist(), quarters, strict=True):
        centre = (quarter + 0.5) * SIDE / 2 + rng.uniform(-22, 22, 2)
        area = outline(rng, thing, centre, rng.uniform(38, 72))
        pixels = np.where(area[..., None], surface(rng, thing), pixels)
        masks = {name: mask & ~area for name, mask in masks.items()} | {thing: area}
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    return image, masks


def write_split(folder: Path, count: int, seed: int) -> int:
    """Writes the pictures, masks and `prompts.csv` of one split; returns how many requests there are."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        image, masks = draw_land(seed + index)
        name = f"land_{index:03d}"
        image.save(folder / "images" / f"{name}.png")
        for thing, prompt in ASKED.items():
            mask = masks.get(thing)
            if mask is None:
                rows.append((f"images/{name}.png", prompt, ""))
            elif mask.mean() >= 0.01:  # else it is hidden by another thing
                path = f"masks/{name}_{thing}.png"
                Image.fromarray(mask).save(folder / path)
                rows.append((f"images/{name}.png", prompt, path))
    with (folder / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "prompt", "mask"), *rows])
    return len(rows)


def write_domain(output: Path, train: int = 64, validation: int = 32, seed: int = 0) -> Path:
    """The whole data set in `output`, with this many pictures in its two splits."""
    for number, (split, count) in enumerate((("train", train), ("validation", validation))):
        requests = write_split(output / split, count, 100_000 * seed + 10_000 * number)
        print(f"{output / split}: {count} pictures, {requests} requests")
    return output


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=64, help="pictures to learn from (default: 64)")
    parser.add_argument("--validation", type=int, default=32, help="pictures to measure on (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of all pictures (default: 0)")
    return parser


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    write_domain(arguments.output, arguments.train, arguments.validation, arguments.seed)
