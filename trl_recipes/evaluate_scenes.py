"""Measures a model on composed scenes it has not seen, and on real photographs with hand-drawn masks.

    python -m trl_recipes.evaluate_scenes --model hub_cards/argenseg-tiny --bank BANK --expressions 1000
    python -m trl_recipes.evaluate_scenes --model hub_cards/argenseg-tiny --real REAL

Every expression is asked alone, the answer is generated freely: where no mask is drawn, the mask is empty. Several
masks in one answer count as their union. Prints one JSON object.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_argenseg  # noqa: F401 (registers the Auto classes)

from .metrics import SegmentationMetrics, best_constant_mask
from .scenes import SceneBank, SceneConfig, SceneDataset, flat_expressions


@torch.no_grad()
def draw(model: Any, processor: Any, samples: Sequence[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Answers (`text`, `segments`) to the requests of samples with `image` (PIL) and `text`, as one batch."""
    conversations = [processor.build_segmentation_conversation(s["image"], s["text"]) for s in samples]
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=True
    ).to(model.device)
    outputs = model.generate(**inputs, return_dict_in_generate=True, **options)
    return processor.post_process_segmentation(
        outputs,
        target_sizes=[s["image"].size[::-1] for s in samples],
        labels=[s["text"] for s in samples],
        prompt_length=inputs["input_ids"].shape[1],
    )


def union(answer: dict[str, Any]) -> np.ndarray | None:
    """All masks of an answer as one (H, W); None where nothing was drawn."""
    masks = [segment["mask"] for segment in answer["segments"]]
    return np.logical_or.reduce(masks) if masks else None


def evaluate_expressions(
    model: Any, processor: Any, samples: Any, batch_size: int = 32, progress: bool = False
) -> dict[str, float]:
    """Metrics over samples with `image`, `text`, `kind` and `mask` (H, W); see `SegmentationMetrics`."""
    model.eval()
    metrics = SegmentationMetrics()
    for start in tqdm(range(0, len(samples), batch_size), desc="drawing", disable=not progress):
        batch = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        for sample, answer in zip(batch, draw(model, processor, batch), strict=True):
            metrics.add(union(answer), sample["mask"], sample["kind"])
    return metrics.compute()


def real_samples(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Every expression of a folder with `real.json` as a sample."""
    folder = Path(folder)
    for item in json.loads((folder / "real.json").read_text())["items"]:
        image = Image.open(folder / item["image"]).convert("RGB")
        mask = np.array(Image.open(folder / item["mask"]).convert("L")) > 127
        for text in item["expressions"]:
            yield {"image": image, "text": text, "kind": item["kind"], "mask": mask}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--bank", help="bank of composed scenes")
    parser.add_argument("--split", default="test", help="test, val or unseen (default: test)")
    parser.add_argument("--preset", default="full", help="easy, medium or full (default: full)")
    parser.add_argument("--expressions", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=2026, help="of the scenes (default: 2026)")
    parser.add_argument("--real", help="folder with real.json, images/ and masks/")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", help="write the JSON there, too")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if (args.bank is None) == (args.real is None):
        raise SystemExit("give one of --bank (composed scenes) and --real (photographs)")
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model)
    if args.bank:
        bank = SceneBank.from_folder(args.bank, args.split)
        scenes = SceneDataset(bank, SceneConfig.preset(args.preset), args.seed, args.expressions)
        samples: Any = flat_expressions(scenes, args.expressions)
    else:
        samples = list(real_samples(args.real))
    result: dict[str, Any] = evaluate_expressions(model, processor, samples, args.batch_size, progress=True)
    result["best_constant_giou"] = best_constant_mask(samples[i]["mask"] for i in range(len(samples)))[1]
    result = {"model": args.model, "data": args.real or f"{args.split}/{args.preset} seed {args.seed}"} | {
        name: round(value, 4) for name, value in result.items()
    }
    print(json.dumps(result, indent=2))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
