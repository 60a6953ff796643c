"""What a preview is worth: the IoU after each scale, and how much of the time has passed by then.

    python examples/benchmarks/previews.py --bank BANK --expressions 200
    python examples/benchmarks/previews.py --bank BANK --model FOLDER --preset easy --json previews.json

Composed scenes of the test split are asked for things that are there. The picture after scale k is what `generate`
gives with `picture_stop_at_scale=k`, decoded; "of the final IoU" is its mean IoU with the true mask over that of the
whole picture, both over the answers that drew something. The time runs from the tokenised request to the mask of that
scale.
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
from modeling_argenseg import PartialPicture, PictureStreamer
from trl_recipes.metrics.masks import count_overlap


def watch_one(model: Any, processor: Any, sample: dict[str, Any]) -> list[tuple[float, float]]:
    """(seconds, IoU) after each scale of the first picture of one answer; empty where nothing was drawn."""
    chat = processor.build_segmentation_conversation(sample["image"], sample["text"])
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    size = sample["image"].size[::-1]
    seen: list[tuple[float, float]] = []
    begin, lost = time.perf_counter(), 0.0  # showing the scales is not part of the time to the next

    def on_scale(partial: PartialPicture) -> None:
        nonlocal lost
        if len(seen) == partial.num_scales:
            return  # a second picture
        drawn = time.perf_counter()
        masks = processor.decode_masks(partial.codes, [size])[1]
        shown = time.perf_counter()
        seen.append((shown - begin - lost, count_overlap(masks[0], sample["mask"]).iou))
        lost += time.perf_counter() - drawn

    model.generate(**inputs, picture_answer_ids=processor.picture_answer_ids, streamer=PictureStreamer(on_scale))
    return seen


def measure(model: Any, processor: Any, samples: Any) -> dict[str, Any]:
    """Means for each scale, over the answers that drew."""
    runs = [watch_one(model, processor, sample) for sample in tqdm(samples, desc="drawing")]
    drawn = np.array([run for run in runs if run])  # (answers, scales, 2)
    if not len(drawn):
        raise SystemExit("the model drew nothing: there is nothing to compare")
    seconds, overlap = drawn.mean(0).T
    sides = model.config.patch_nums
    scales = [
        {"scale": f"{side}x{side}", "iou": i, "of_final_iou": i / overlap[-1], "of_time": s / seconds[-1]}
        for side, i, s in zip(sides, overlap.tolist(), seconds.tolist(), strict=True)
    ]
    return {"asked": len(runs), "drew": len(drawn), "seconds": float(seconds[-1]), "scales": scales}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_scene_arguments(parser)
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = make_parser().parse_args(arguments)
    found = measure(*open_scenes(args))
    print(f"{found['asked']} requests, {found['drew']} drawn, {found['seconds']:.3f} s for a whole picture\n")
    print("| scale | mean IoU | of the final IoU | of the time |\n|---|---|---|---|")
    for one in found["scales"]:
        print(f"| {one['scale']} | {one['iou']:.3f} | {one['of_final_iou']:.0%} | {one['of_time']:.0%} |")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
