"""Fine-tunes a model on 64 pictures of a domain that it has never seen, and says what came of it.

    python examples/lora_new_domain/run.py --model hub_cards/argenseg-tiny --output outputs/land

draws the data set (`draw_domain.py`), runs `trl_recipes.lora` on it, and writes into the folder of the results
(default: OUTPUT) `learning_curve.png`, `before_after.png` and `result.json` with the command, validation gIoU before
and after, and the time it took. What follows `--` goes to the recipe: `run.py --output out -- --learning_rate 2e-3`.
Stopped, it goes on when the same command is given again.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from draw_domain import write_domain
from PIL import Image

from trl_recipes import lora
from trl_recipes.command_line import errors_in_a_line
from trl_recipes.mask_data import load_mask_data
from trl_recipes.mask_data.mask_values import union_of
from trl_recipes.metrics import best_constant_mask
from trl_recipes.picture_grid import CAPTION, GAP, SIDE, paste_tile

RECIPE = {
    "max_steps": 120, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "lora_targets": "attention",
    "eval_steps": 0.25, "save_steps": 0.25, "seed": 0,
}  # fmt: skip


def recipe_arguments(model: str, data: Path, output: Path, further: list[str]) -> list[str]:
    """The command line of the recipe; `further` words win over those of `RECIPE`."""
    words = [str(word) for name, value in RECIPE.items() for word in (f"--{name}", value)]
    return ["--model", model, "--data", str(data), "--output", str(output), *words, *further]


def before_and_after(before: Path, after: Path, lines: int = 6) -> Image.Image:
    """The first lines of two grids of the recipe (image | truth | drawn), side by side: image, truth, before, after."""
    grids = [Image.open(path).convert("RGB") for path in (before, after)]
    width, height = grids[0].width // 2, SIDE + CAPTION + GAP
    sheet = Image.new("RGB", (4 * (SIDE + GAP), lines * height + 20), "white")
    for place, title in enumerate(("image and request", "truth", "before", "after")):
        paste_tile(sheet, Image.new("RGB", (SIDE, 1), "white"), title, place * (SIDE + GAP), 2)
    for number in range(min(lines, 2 * (grids[0].height // height))):
        left, top = (number % 2) * width, (number // 2) * height
        for place, (grid, tile) in enumerate(((grids[0], 0), (grids[0], 1), (grids[0], 2), (grids[1], 2))):
            corner = left + tile * (SIDE + GAP)
            part = grid.crop((corner, top, corner + SIDE, top + SIDE + CAPTION))
            sheet.paste(part, (place * (SIDE + GAP), number * height + 20))
    return sheet


def constant_giou(data: Path) -> float:
    """Validation gIoU of the best answer that does not look at the image."""
    rows = load_mask_data(data, "validation", progress=False)
    return best_constant_mask(np.asarray(union_of(row["masks"], row["image_size"])) for row in rows)[1]


def measure(output: Path, merged_step: int) -> dict[str, Any]:
    """Validation before the first step and of the merged model."""
    measured = {int(entry["step"]): entry for entry in lora.read_metrics(output)}
    before, after = measured[0], measured[merged_step]
    return {"before": before, "after": after, "giou_lift": round(after["giou"] - before["giou"], 4)}


def run(model: str, output: Path, results: Path, train: int, validation: int, further: list[str]) -> dict[str, Any]:
    """The whole example; returns what `result.json` holds."""
    data = write_domain(output / "data", train, validation)
    words = recipe_arguments(model, data, output, further)
    recipe, training = lora.make_parser().parse_args_into_dataclasses(words)
    resumed = bool(list(output.glob("checkpoint-*")))
    wall, cpu = time.perf_counter(), time.process_time()
    with errors_in_a_line():
        trainer, sizes = lora.prepare(recipe, training)
    lora.report(trainer, lora.train(trainer))
    minutes = {"wall": (time.perf_counter() - wall) / 60, "cpu": (time.process_time() - cpu) / 60}
    best = trainer.state.best_model_checkpoint
    step = int(Path(best).name.removeprefix("checkpoint-")) if best else trainer.state.global_step
    result = {
        "command": "python -m trl_recipes.lora " + " ".join(words),
        "adapters": f"{sizes.adapters} parameters, {sizes.share:.2%} of the model",
        "minutes": None if resumed else {name: round(value, 1) for name, value in minutes.items()},
        "best_constant_giou": round(constant_giou(data), 4),
        **measure(output, step),
    }
    results.mkdir(parents=True, exist_ok=True)
    if results != output:
        shutil.copy(output / "learning_curve.png", results)
    before_and_after(output / "drawn-000000.png", output / f"drawn-{step:06d}.png").save(results / "before_after.png")
    (results / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hub_cards/argenseg-tiny", help="folder (default: hub_cards/argenseg-tiny)")
    parser.add_argument("--output", type=Path, default=Path("outputs/land"), help="of the run (default: outputs/land)")
    parser.add_argument("--results", type=Path, help="folder of curve, pictures and result.json (default: OUTPUT)")
    parser.add_argument("--train", type=int, default=64, help="pictures to learn from (default: 64)")
    parser.add_argument("--validation", type=int, default=32, help="pictures to measure on (default: 32)")
    parser.add_argument("further", nargs="*", metavar="-- OPTION", help="options of trl_recipes.lora")
    return parser


def main(words: list[str] | None = None) -> dict[str, Any]:
    options = make_parser().parse_args(words)
    results = options.results or options.output
    result = run(options.model, options.output, results, options.train, options.validation, options.further)
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
