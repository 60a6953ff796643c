"""How well the image features of a model, compared with its words and without its language model, name things and find
them, how well its language model marks them, and how well the whole model draws them: whether a model that answers
wrongly does not see, does not listen, or does not draw. For models that were trained with `WordRegions`; what is marked
tells something of those that were trained with `MaskRegions`.

    python -m trl_recipes.naming --model hub_cards/argenseg-tiny --bank BANK --split val
"""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from modeling_argenseg import ARGenSegForConditionalGeneration
from processing import ARGenSegProcessor

from .command_line import errors_in_a_line, loading
from .evaluation.answers import draw, union
from .help_format import Help
from .mask_regions import MaskRegions, at_queries, mean_on_masks
from .scene_samples import MissingEncoder, SceneCollator, SceneSamples, model_inputs, scene_turns
from .scenes import Scene, SceneBank, SceneConfig, SceneDataset
from .scenes.view import Expression
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


def several_names(scenes: SceneDataset, title: str) -> Iterator[tuple[Scene, list[str]]]:
    """The scenes that show several names, and these, with a progress bar."""
    for index in tqdm(range(len(scenes)), desc=title):
        scene, _ = scenes.scene(index)
        names = sorted({item.sprite.name for item in scene.objects})
        if len(names) > 1:
            yield scene, names


def drawn(model: Any, processor: Any, scenes: SceneDataset) -> float:
    """Share of the names, each asked for once in every scene with several, for which the mask lies mostly on a thing of
    that name; nothing drawn is wrong. A model that always draws one thing, whatever the name, reaches the `chance` of
    `naming`. NaN where there is nothing to count."""
    right: list[float] = []
    for scene, names in several_names(scenes, "asking by name"):
        samples = [{"image": scene.image, "text": f"the {name}"} for name in names]
        for name, answer in zip(names, draw(model, processor, samples, follow_edges=False), strict=True):
            mask = union(answer)
            covered = [0 if mask is None else (mask & scene.mask([one.index])).sum() for one in scene.objects]
            right.append(max(covered) > 0 and scene.objects[int(np.argmax(covered))].sprite.name == name)
    return mean(right)


@torch.no_grad()
def marked(model: Any, processor: Any, scenes: SceneDataset) -> float:
    """Share of the names, as in `drawn`, for which the queries of the last scale mark a thing of that name most, while
    all scales before are empty: what the language model knows of the place before anything is drawn."""
    encoder, side = MissingEncoder(processor), model.config.patch_nums[-1]
    regions = MaskRegions(model.config.text_config.hidden_size, encoder.patch_nums).to(model.device)
    samples, collator = SceneSamples(scenes, processor), SceneCollator(processor.tokenizer.pad_token_id)
    right: list[float] = []
    for scene, names in several_names(scenes, "marking by name"):
        rows = samples.writer([scene_turns(processor, Expression(f"the {name}", "noun")) for name in names])
        masks = [scene.mask([one.index for one in scene.objects if one.sprite.name == name]) for name in names]
        sample = {"image": samples.picture(scene), "rows": rows, "masks": np.packbits(np.stack(masks), axis=-1)}
        batch = model_inputs([sample], collator, encoder)
        batch.pop("labels")
        hidden = model.model(**batch.to(model.device)).last_hidden_state
        marks = regions.logits(at_queries(model, hidden, batch["input_ids"])[0]).sigmoid().cpu()[:, -side * side :]
        shares = shares_of_cells(scene, side)[[one.index for one in scene.objects]]
        found = mean_on_masks(marks, torch.from_numpy(shares).float())
        right += [scene.objects[int(row.argmax())].sprite.name == name for row, name in zip(found, names, strict=True)]
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
    with errors_in_a_line():
        with loading(args.model):
            processor = ARGenSegProcessor.from_pretrained(args.model)
            model = ARGenSegForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
        words = WordList(SceneBank.from_folder(args.bank, "train"), token_side(processor.image_seq_length))
        bank = SceneBank.from_folder(args.bank, args.split)
        scenes = SceneDataset(bank, SceneConfig.preset(args.preset), 1, args.scenes)
    result = naming(model, processor, scenes, words)
    result |= {"marked": marked(model, processor, scenes), "drawn": drawn(model, processor, scenes)}
    print(", ".join(f"{key} {value:.3f}" for key, value in result.items()))


if __name__ == "__main__":
    main(make_parser().parse_args())
