"""Composed scenes that are asked for things which are there: what the benchmarks about masks have in common."""

import argparse
from pathlib import Path
from typing import Any

import torch

from modeling_argenseg import ARGenSegForConditionalGeneration
from processing import ARGenSegProcessor
from trl_recipes.command_line import errors_in_a_line, loading
from trl_recipes.scenes import SceneBank, SceneConfig, SceneDataset, flat_expressions

ROOT = Path(__file__).resolve().parents[2]


def add_scene_arguments(parser: argparse.ArgumentParser) -> None:
    """What `open_scenes` reads."""
    parser.add_argument("--bank", required=True, help="folder of a scene bank")
    parser.add_argument("--model", default=str(ROOT / "hub_cards" / "argenseg-tiny"), help="folder or Hub name")
    parser.add_argument("--split", default="test", help="of the bank (default: test)")
    parser.add_argument("--preset", default="full", help="of the scenes (default: full)")
    parser.add_argument("--expressions", type=int, default=200, help="requests (default: 200)")
    parser.add_argument("--seed", type=int, default=2026, help="of the scenes (default: 2026)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def open_scenes(args: argparse.Namespace) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Model, processor, and samples (`image`, `text`, `kind`, `mask`) of things that are there."""
    torch.set_num_threads(args.threads)
    with errors_in_a_line():
        bank = SceneBank.from_folder(args.bank, args.split)
        scenes = SceneDataset(bank, SceneConfig.preset(args.preset), args.seed, 2 * args.expressions, 4)
        with loading(args.model):
            processor = ARGenSegProcessor.from_pretrained(args.model)
            model = ARGenSegForConditionalGeneration.from_pretrained(args.model).eval()
    samples: list[dict[str, Any]] = []
    flat = flat_expressions(scenes, 4 * len(scenes))
    for index in range(len(flat)):
        if len(samples) == args.expressions:
            break
        if flat[index]["mask"].any():
            samples.append(flat[index])
    return model, processor, samples
