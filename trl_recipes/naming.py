"""How well the image features of a model, compared with its words and without its language model, name things and find
them, and how well the whole model finds them by name: whether a model that answers wrongly does not see, or does not
use what it sees. For models that were trained with `WordRegions`.

    python -m trl_recipes.naming --model hub_cards/argenseg-tiny --bank BANK --split val
"""

import argparse
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from modeling_argenseg import ARGenSegForConditionalGeneration
from processing import ARGenSegProcessor

from .evaluation.answers import draw, union
from .help_format import Help
from .scenes import Scene, SceneBank, SceneConfig, SceneDataset
from .word_regions import LEAST_SHARE, TEMPERATURE, WordList, WordRegions, shares_of_cells, token_side


@torch.no_grad()
def naming(model: Any, processor: Any, scenes: SceneDataset, words: WordList) -> dict[str, float]:
    """`named`: share of the things in the scenes whose features are nearest to their own name among all names. `found`:
    share of the names whose nearest thing in its scene has that name, in scenes with several; `chance`: what guessing
    would find. NaN where there is nothing to count.

    Args:
        words: with the names of all sprites, as in training.

    Raises:
        ValueError: a thing in the scenes has none of these names.
    """
    regions = WordRegions(words, processor.tokenizer).to(model.device)
    names = regions.embed(regions.nouns[:-1], model.get_input_embeddings().weight)  # the last is the background
    named: list[float] = []
    found: list[float] = []
    chance: list[float] = []
    for index in tqdm(range(len(scenes)), desc="naming things"):
        scene, _ = scenes.scene(index)
        likeness = likeness_of_things(model, processor, scene, names, words.side)
        own = [words.nouns.index(item.sprite.name) for item in scene.objects]
        named += [int(row.argmax()) == name for row, name in zip(likeness, own, strict=True)]
        if len(set(own)) > 1:
            for name in sorted(set(own)):
                found.append(own[int(likeness[:, name].argmax())] == name)
                chance.append(own.count(name) / len(own))
    counts: dict[str, list[float]] = {"named": named, "found": found, "chance": chance}
    return {key: mean(values) for key, values in counts.items()}


def likeness_of_things(model: Any, processor: Any, scene: Scene, names: torch.Tensor, side: int) -> torch.Tensor:
    """Log-probability (things, words) of each word, mean over the cells that a thing covers most."""
    pixels = processor.image_processor(scene.image, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    features = model.get_image_features(pixels, return_dict=True).pooler_output[0].float()
    half = F.normalize(features[:, : features.shape[1] // 2], dim=-1)
    words = (half @ names.T / TEMPERATURE).log_softmax(-1)
    shares = shares_of_cells(scene, side)
    shown = [shares[item.index] >= min(LEAST_SHARE, shares[item.index].max()) for item in scene.objects]
    return torch.stack([words[torch.from_numpy(cells)].mean(0) for cells in shown])


def drawn(model: Any, processor: Any, scenes: SceneDataset) -> float:
    """Share of the names, each asked for once in every scene with several, for which the mask lies mostly on a thing of
    that name; nothing drawn is wrong. A model that always draws one thing, whatever the name, reaches the `chance` of
    `naming`. NaN where there is nothing to count."""
    right: list[float] = []
    for index in tqdm(range(len(scenes)), desc="asking by name"):
        scene, _ = scenes.scene(index)
        names = sorted({item.sprite.name for item in scene.objects})
        if len(names) == 1:
            continue
        samples = [{"image": scene.image, "text": f"the {name}"} for name in names]
        for name, answer in zip(names, draw(model, processor, samples), strict=True):
            mask = union(answer)
            covered = [0 if mask is None else (mask & scene.mask([one.index])).sum() for one in scene.objects]
            right.append(max(covered) > 0 and scene.objects[int(np.argmax(covered))].sprite.name == name)
    return mean(right)


def mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--bank", required=True, help="folder of cut-outs, see `make bank`")
    parser.add_argument("--split", default="val", help="whose sprites the scenes show; names are those of train")
    parser.add_argument("--preset", default="full", help="of the scenes")
    parser.add_argument("--scenes", type=int, default=200, help="number of scenes")
    return parser


def main(args: argparse.Namespace) -> None:
    processor = ARGenSegProcessor.from_pretrained(args.model)
    model = ARGenSegForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    words = WordList(SceneBank.from_folder(args.bank, "train"), token_side(processor.image_seq_length))
    bank = SceneBank.from_folder(args.bank, args.split)
    scenes = SceneDataset(bank, SceneConfig.preset(args.preset), 1, args.scenes)
    result = naming(model, processor, scenes, words) | {"drawn": drawn(model, processor, scenes)}
    print(", ".join(f"{key} {value:.3f}" for key, value in result.items()))


if __name__ == "__main__":
    main(make_parser().parse_args())
