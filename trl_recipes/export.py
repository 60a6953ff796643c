"""Writes a trained folder as it is published: weights stored in half precision, run in single.

    python -m trl_recipes.export --model out/fine --output hub_cards/argenseg-tiny

The model's weights are rounded to fp16 in the file, while `config.json` says float32, so that `from_pretrained` runs in
fp32 everywhere at half the download. The visual tokenizer stays fp32: in less, the nearest codes come out different.
Files that are in the output folder and that no part writes (such as the card) are left alone.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import modeling_argenseg  # noqa: F401 (registers the Auto classes)


def store_in_half(folder: Path) -> None:
    """Rounds `model.safetensors` to fp16, but for the quantizer, and keeps the float32 of `config.json`.

    Raises:
        ValueError: a weight does not fit into fp16.
    """
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or ".quantizer." in name:
            continue
        tensors[name] = tensor.half()
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{name} holds values beyond fp16's range; publish it in float32")
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if config.get("dtype") != "float32":
        raise ValueError(f"config.json says dtype {config.get('dtype')!r}; export from a float32 model")


def export(source: str | Path, output: str | Path, picture_logit_adjustment: float | None = None) -> Path:
    """Model, processor, tokenizers, generation config and the code of `source`, ready to publish in `output`."""
    output = Path(output)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    model.config.visual_tokenizer_config.name_or_path = ""  # no paths of the machine that trained it
    if picture_logit_adjustment is not None:
        settings = model.generation_config.to_dict()
        settings["_from_model_config"] = False  # or transformers would not read entries of ours back
        model.generation_config = GenerationConfig(**settings, picture_logit_adjustment=picture_logit_adjustment)
    model.save_pretrained(output, save_original_format=False)
    AutoProcessor.from_pretrained(source).save_pretrained(output)
    store_in_half(output)
    return output


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model with its processor")
    parser.add_argument("--output", required=True, help="folder to publish, e.g. hub_cards/argenseg-tiny")
    parser.add_argument(
        "--picture-logit-adjustment", type=float, help="default of the model's `generate` (chosen on validation scenes)"
    )
    return parser


def main() -> None:
    args = make_parser().parse_args()
    folder = export(args.model, args.output, args.picture_logit_adjustment)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size / 1e6:9.3f} MB  {path.relative_to(folder)}")


if __name__ == "__main__":
    main()
