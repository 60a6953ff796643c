"""Writes a trained folder as it is published: weights stored in half precision, run in single.

    python -m trl_recipes.export --model out/fine --output hub_cards/argenseg-tiny

The model's weights are rounded to fp16 in the file, while `config.json` says float32, so that `from_pretrained` runs in
fp32 everywhere at half the download. Visual tokenizer and codebook stay fp32 where rounding would change a number (with
other numbers the nearest codes come out different); those of `train_visual_tokenizer` are fp16 numbers already.
Of adapters, such as training with --load_in_4bit leaves them, it makes a whole model.
Files that are in the output folder and that no part writes (such as the card) are left alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import modeling_argenseg  # noqa: F401 (registers the Auto classes)

from .adapters import load_whole
from .command_line import errors_in_a_line, loading


def store_in_half(path: Path, exact: str) -> None:
    """Rewrites a safetensors file in fp16; tensors with `exact` in their name only where that changes no number.

    Raises:
        ValueError: a weight does not fit into fp16.
    """
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file is not mapped any more
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            continue
        half = tensor.half()
        if exact in name and not torch.equal(half.float(), tensor):
            continue
        if not bool(half.isfinite().all()):
            raise ValueError(f"{name} holds values beyond fp16's range; publish it in float32")
        tensors[name] = half
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(path)


def require_float32(folder: Path) -> None:
    """Raises ValueError unless `config.json` makes `from_pretrained` load in float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("dtype") != "float32":
        raise ValueError(f"config.json says dtype {config.get('dtype')!r}; export from a float32 model")


def set_picture_options(model: Any, **options: Any) -> None:
    """Makes options of `generate` for pictures, such as `picture_logit_adjustment`, defaults that are saved."""
    model.generation_config.update(allow_custom_entries=True, **options)


def export(
    source: str | Path,
    output: str | Path,
    picture_logit_adjustment: float | None = None,
    search_steps: int | None = None,
    follow_edges: bool | None = None,
) -> Path:
    """Model, processor, tokenizers, generation config and the code of `source`, ready to publish in `output`.

    Raises:
        ValueError: there is no such model, or its weights are quantised, or do not fit into half precision.
    """
    output = Path(output)
    with loading(str(source)):
        model, processor = load_whole(source)
    model.config.visual_tokenizer_config.name_or_path = ""  # no paths of the machine that trained it
    set_picture_options(model, picture_answer_ids=processor.picture_answer_ids)
    if picture_logit_adjustment is not None:
        set_picture_options(model, picture_logit_adjustment=picture_logit_adjustment)
    if search_steps is not None:
        for config in (model.config.visual_tokenizer_config, processor.visual_tokenizer.config):
            config.search_steps = search_steps
    if follow_edges is not None:
        processor.follow_edges = follow_edges
    model.save_pretrained(output, save_original_format=False)
    processor.save_pretrained(output)
    for folder, exact in ((output, ".quantizer."), (output / "visual_tokenizer", "")):
        require_float32(folder)
        store_in_half(folder / "model.safetensors", exact)
    return output


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model with its processor")
    parser.add_argument("--output", required=True, help="folder to publish, e.g. hub_cards/argenseg-tiny")
    parser.add_argument(
        "--picture-logit-adjustment", type=float, help="default of the model's `generate` (chosen on validation scenes)"
    )
    parser.add_argument("--search-steps", type=int, help="default of the visual tokenizer's `encode`")
    parser.add_argument(
        "--follow-edges",
        action=argparse.BooleanOptionalAction,
        help="whether masks follow the edges of their image where it is at hand: a default of the processor",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    with errors_in_a_line():
        folder = export(args.model, args.output, args.picture_logit_adjustment, args.search_steps, args.follow_edges)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size / 1e6:9.3f} MB  {path.relative_to(folder)}")


if __name__ == "__main__":
    main()
