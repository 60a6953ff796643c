"""How much of a task's masks is left once they are visual tokens: no model can draw better than that.

    python -m trl_recipes.reconstruction --model hub_cards/argenseg-tiny --task scenes --data BANK --limit 400
    python -m trl_recipes.reconstruction --model hub_cards/argenseg-tiny --task real --data PHOTOGRAPHS

Every mask is turned into tokens and back, at its own size; every different one counts once. The table has a line for
each number of search steps: 0 takes the nearest codes, more try out tokens of the last scale (`VARTokenizer.encode`).
Columns by size: the share of the image that a mask covers.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from processing import ARGenSegProcessor
from processing.mask_inputs import load_mask

from .command_line import loading
from .evaluate import add_task_arguments, open_task
from .tasks import Samples, read_samples

BORDERS = (0.01, 0.03, 0.1)  # between the columns by size
BATCH = 16


def target_masks(samples: Samples, limit: int | None) -> list[np.ndarray]:
    """The masks (H, W) of the samples that have one, each once, the first `limit` of them."""
    found: dict[Any, np.ndarray] = {}
    with tqdm(total=limit, desc="reading masks", unit="mask") as bar:
        for sample in samples:
            if sample.load_mask is None:
                continue
            mask = load_mask(sample.load_mask())
            if mask.any() and found.setdefault((mask.shape, mask.tobytes()), mask) is mask:
                bar.update()
            if len(found) == limit:
                break
    return list(found.values())


def reconstruct(processor: Any, masks: list[np.ndarray], search_steps: int | None = None) -> list[float]:
    """IoU of every mask with what its tokens decode to."""
    ious: list[float] = []
    for start in tqdm(range(0, len(masks), BATCH), desc=f"search steps: {search_steps}", leave=False):
        part = masks[start : start + BATCH]
        ids = processor.encode_masks(part, search_steps=search_steps)
        _, drawn = processor.decode_masks(ids, [mask.shape for mask in part])
        ious += [float((a & b).sum() / (a | b).sum()) for a, b in zip(part, drawn, strict=True)]
    return ious


def by_size(masks: list[np.ndarray], ious: list[float]) -> list[float]:
    """Mean IoU of masks in each column by size; NaN where there are none."""
    place = np.digitize([mask.mean() for mask in masks], BORDERS)
    groups = [np.array(ious)[place == column] for column in range(len(BORDERS) + 1)]
    return [float(group.mean()) if len(group) else float("nan") for group in groups]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl_recipes.reconstruction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task_arguments(parser)
    add = parser.add_argument
    add("--limit", type=int, metavar="N", help="only the first N masks")
    add("--search-steps", type=int, nargs="+", metavar="N", help="default: 0 and those of the configuration")
    add("--bf16", action="store_true", help="decode in bfloat16: quicker where the processor multiplies it in hardware")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    if min(args.search_steps or [0]) < 0 or (args.limit is not None and args.limit < 1):
        raise SystemExit("error: --search-steps must be 0 or more, --limit 1 or more")
    try:
        source = open_task(args)
        with loading(args.model):
            processor: Any = ARGenSegProcessor.from_pretrained(args.model)
        visual_tokenizer = processor._require_visual_tokenizer()
        masks = target_masks(read_samples(source), args.limit)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if not masks:
        raise SystemExit(f"error: {args.task} has no masks")
    if args.bf16:
        visual_tokenizer.decode_dtype = torch.bfloat16
    all_steps = args.search_steps or sorted({0, visual_tokenizer.config.search_steps})
    edges = ["0", *(f"{100 * border:g}" for border in BORDERS), "100"]
    columns = [f"{low}-{high} %" for low, high in zip(edges, edges[1:], strict=False)]
    print(f"{len(masks)} masks of {source.task.name}, {source.split}: mean IoU after tokens and back")
    print(f"{'search steps':>12s} {'all':>8s} " + " ".join(f"{name:>8s}" for name in columns) + f" {'s a mask':>9s}")
    for steps in all_steps:
        began = time.perf_counter()
        ious = reconstruct(processor, masks, steps)
        seconds = (time.perf_counter() - began) / len(masks)
        told = " ".join(f"{iou:8.3f}" for iou in by_size(masks, ious))
        print(f"{steps:12d} {np.mean(ious):8.4f} {told} {seconds:9.3f}", flush=True)


if __name__ == "__main__":
    main()
