"""Look at composed scenes, or measure them, from the command line."""

from __future__ import annotations

import argparse
import time
from collections import Counter

import numpy as np
from PIL import Image

from ..picture_grid import overlay, paste_tile
from .bank import SPLITS, SceneBank
from .config import PRESETS, SceneConfig
from .dataset import SceneDataset

EPILOG = """examples:
  a sheet of twelve training scenes, each beside its expressions with their masks in colour:
    python -m trl_recipes.scenes --bank BANK --split train --count 12 --preset full --output sheet.png
  what the model has never seen:
    python -m trl_recipes.scenes --bank BANK --split unseen --output unseen.png
  shares of the kinds, mask areas and speed over 500 scenes:
    python -m trl_recipes.scenes --bank BANK --preset easy --stats 500

The same bank, split, preset, seed and image size always give the same scenes.
"""
CAPTION = 30


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and write a sheet, print statistics, or both."""
    options = _parser().parse_args(arguments)
    config = SceneConfig.preset(options.preset, image_size=options.image_size)
    try:
        bank = SceneBank.from_folder(options.bank, options.split)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    length = max(options.count, options.stats)
    dataset = SceneDataset(bank, config, options.seed, length, options.expressions)
    if options.output:
        contact_sheet(dataset, options.count).save(options.output)
        print(f"wrote {options.output}")
    if options.stats:
        print(statistics(dataset, options.stats))
    if not options.output and not options.stats:
        raise SystemExit("error: nothing to do; pass --output FILE for a sheet or --stats N for numbers")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trl_recipes.scenes",
        description="Compose training scenes from a bank of cut-outs; look at them or measure them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bank", required=True, help="folder: sprites.parquet, backgrounds.parquet, vocabulary.json")
    parser.add_argument("--split", default="train", choices=SPLITS, help="which sprites and backgrounds (train)")
    parser.add_argument("--preset", default="full", choices=sorted(PRESETS), help="number and size of objects (full)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole series (0)")
    parser.add_argument("--count", type=int, default=12, help="scenes on the sheet (12)")
    parser.add_argument("--expressions", type=int, default=4, help="expressions per scene (4)")
    parser.add_argument("--image-size", type=int, default=256, help="side of a scene in pixels (256)")
    parser.add_argument("--output", help="picture file for the contact sheet")
    parser.add_argument("--stats", type=int, default=0, metavar="N", help="print statistics over N scenes")
    return parser


def contact_sheet(dataset: SceneDataset, count: int, columns: int = 2) -> Image.Image:
    """An RGB picture: each scene, then one tile per expression with its mask in colour and its text below."""
    side = dataset.config.image_size
    tiles = dataset.expressions_per_scene + 1
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * tiles * side + (columns - 1) * 8, rows * (side + CAPTION)), "white")
    for index in range(count):
        row, column = divmod(index, columns)
        left, top = column * (tiles * side + 8), row * (side + CAPTION)
        item = dataset[index]
        paste_tile(sheet, item["image"], f"scene {index}", left, top)
        for place, one in enumerate(item["expressions"], start=1):
            caption = f"[{one['kind']}] {one['text']}" + (f" / no {one['missing']}" if one["missing"] else "")
            paste_tile(sheet, overlay(item["image"], one["mask"]), caption, left + place * side, top)
    return sheet


def statistics(dataset: SceneDataset, count: int) -> str:
    """Shares of kinds and styles, mask areas (fractions of the picture) and speed, as text."""
    dataset.bank.preload()
    start = time.perf_counter()
    items = [_measured(dataset, index) for index in range(count)]
    seconds = time.perf_counter() - start
    kinds = Counter(kind for item in items for kind, _ in item[1])
    areas = np.array([area for item in items for kind, area in item[1] if kind != "none"])
    styles = Counter(style for item in items for style in item[2])
    objects = Counter(len(item[2]) for item in items)
    total, drawn = sum(kinds.values()), sum(styles.values())
    marks = (5, 25, 50, 75, 95)
    lines = [
        f"{count} scenes, {total} expressions, {count / seconds:.0f} scenes/s ({total / seconds:.0f} expressions/s)",
        "kinds:   " + ", ".join(f"{kind} {100 * number / total:.1f} %" for kind, number in kinds.most_common()),
        "styles:  " + ", ".join(f"{style} {100 * number / drawn:.1f} %" for style, number in styles.most_common()),
        "objects: " + ", ".join(f"{size}: {100 * objects[size] / count:.0f} %" for size in sorted(objects)),
        f"areas:   mean {areas.mean():.3f}; "
        + ", ".join(f"{mark} % {value:.3f}" for mark, value in zip(marks, np.percentile(areas, marks), strict=True)),
    ]
    return "\n".join(lines)


def _measured(dataset: SceneDataset, index: int) -> tuple[int, list[tuple[str, float]], list[str]]:
    scene, found = dataset.scene(index)
    areas = [(one.kind, float(scene.mask(one.object_ids).mean())) for one in found]
    return index, areas, [one.sprite.style for one in scene.objects]


if __name__ == "__main__":
    main()
