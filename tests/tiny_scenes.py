"""A scene bank drawn in code, a visual tokenizer that codes grey values, and recipes of toy size."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from transformers import TrainingArguments

from modeling_argenseg import VARTokenizer, VARTokenizerConfig
from trl_recipes.scenes import SceneBank, SceneConfig, SceneDataset
from trl_recipes.train_scenes import SceneArguments

SEED = 7  # of scenes whose first has three things to draw and one that is not there
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 40),
    "white": (240, 240, 240),
    "blue": (30, 40, 220),
    None: (9, 99, 99),
}
NOUNS = {
    "disc": ("round thing", ["dial"]),
    "stool": ("flat thing", ["plank"]),
    "bench": ("flat thing", []),
    "egg": ("round thing", []),
    "balloon": ("round thing", []),
}
VOCABULARY = {
    "reasoning": {"something you can roll": ["disc", "egg"], "a flat surface": ["stool"]},
    "irregular_plurals": {},
    "as_one": {},
    "parents": {"round thing": ["solid"], "flat thing": ["solid"]},
}
SOURCES = (("camera", True), ("sh3d", False), ("drawn", False))


def _png(picture: Image.Image) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _shape(noun: str, color: tuple[int, int, int]) -> Image.Image:
    picture = Image.new("RGBA", (64, 48))
    draw = ImageDraw.Draw(picture)
    if noun in ("stool", "bench"):
        draw.rectangle((6, 10, 58, 40), fill=(*color, 255))
    else:
        draw.ellipse((4, 4, 60, 44), fill=(*color, 255))
    return picture


def _sprite_rows() -> list[dict]:
    rows = []
    for split, nouns in {
        "train": ("disc", "stool", "bench", "egg"),
        "val": ("disc", "stool"),
        "test": ("disc", "stool", "egg"),
        "unseen": ("balloon",),
    }.items():
        for noun in nouns:
            category, synonyms = NOUNS[noun]
            for number, (color, rgb) in enumerate(COLORS.items()):
                src, photo = SOURCES[number % 3]
                words = {"noun": noun, "synonyms": synonyms + ["balloon"] * (noun == "egg"), "categories": [category]}
                origin = {"photo": photo, "src": src, "id": f"{split}:{noun}:{number}", "split": split}
                rows.append({"image": _png(_shape(noun, rgb)), "color": color, **words, **origin})
    return rows


def _background_rows() -> list[dict]:
    avoids = {"train": [[], ["egg"], []], "val": [[]], "test": [[]]}
    return [
        {
            "image": _png(Image.new("RGB", (160, 96 + 8 * i), (90, 120, 90))),
            "floor": 0.4,
            "avoid": avoid,
            "split": split,
        }
        for split, several in avoids.items()
        for i, avoid in enumerate(several)
    ]


def write_bank(folder: Path) -> Path:
    """The bank of these sprites and backgrounds, in the files that `SceneBank` reads."""
    pq.write_table(pa.Table.from_pylist(_sprite_rows()), folder / "sprites.parquet")
    pq.write_table(pa.Table.from_pylist(_background_rows()), folder / "backgrounds.parquet")
    (folder / "vocabulary.json").write_text(json.dumps(VOCABULARY))
    return folder


@torch.no_grad()
def grey_tokenizer(sides: tuple[int, ...] = (1, 2, 4, 8), codes: int = 17) -> VARTokenizer:
    """A `VARTokenizer` whose latent is the picture itself: the mean of the channels, up to 0.002.

    Its codes are grey values from -2 to 2 in equal steps, so that tokens can be worked out by hand: the first scale
    codes the mean, every other what is left over. A far bias makes SiLU the identity.
    """
    config = VARTokenizerConfig(
        image_size=sides[-1],
        base_channels=1,
        channel_multipliers=[1],
        num_res_blocks=1,
        norm_num_groups=0,
        use_attention=False,
        latent_channels=1,
        vocab_size=codes,
        patch_nums=sides,
    )
    model = VARTokenizer(config).eval()
    for name, parameter in model.named_parameters():
        if ".conv2." in name:  # residual blocks add nothing
            parameter.zero_()
    biases = {model.quant_conv: 0, model.post_quant_conv: 0}
    for half in (model.encoder, model.decoder):
        biases |= {half.conv_in: 10, half.conv_out: -10}
    for convolution, bias in biases.items():
        convolution.weight.zero_()
        convolution.weight[:, :, 1, 1] = 1 / convolution.in_channels
        convolution.bias.fill_(bias)
    model.quantize.embedding.weight.copy_(torch.linspace(-2, 2, codes)[:, None])
    return model


def scenes(bank: Path, seed: int = SEED) -> SceneDataset:
    """What a recipe with these arguments trains on, if its schedule is ["easy"]."""
    return SceneDataset(SceneBank.from_folder(bank, "train"), SceneConfig.preset("easy"), seed, 20, 4)


SHORT_TEXTS = dict(text_vocab_size=300, text_scenes=20)  # of a model from scratch


def scene_arguments(bank: Path, visual_tokenizer: Path, **changes: Any) -> SceneArguments:
    """The scene recipe with one narrow layer and pictures of three scales."""
    sizes = dict(
        hidden_size=64, num_layers=1, vision_layers=1, eval_expressions=2,
        num_scales=3, questions_per_scene=0, image_tokens=64, freeze_trunk=True, slips=0.0,
    )  # fmt: skip
    options = sizes | ({} if "start_from" in changes else SHORT_TEXTS) | changes
    return SceneArguments(bank=str(bank), visual_tokenizer=str(visual_tokenizer), **options)


def training_arguments(output: Path, **changes: Any) -> TrainingArguments:
    """One sample a step on the CPU; every step is logged."""
    options = dict(
        output_dir=str(output), use_cpu=True, per_device_train_batch_size=1, logging_steps=1, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    return TrainingArguments(**(options | changes))


def logged(folder: Path, name: str = "loss") -> dict[int, float]:
    """What a run has logged under `name`, by step, as its last checkpoint tells."""
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    history = json.loads(states[-1].read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}
