"""Whole folders from the released layout to ours and back, tensor by tensor (the program of `conversion_argenseg`).

Everything is checked before anything is written; what is written goes to a folder beside the target, which gets the
target's name when it is complete.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from .configuration_argenseg import ARGenSegConfig
from .released_checkpoint import PREFIX, ReleasedCheckpoint, find_released, released_shapes, tokenizer_folder
from .tensor_files import INDEX, WEIGHTS, PlannedTensor, StoredTensor, read_folder, write_safetensors
from .var_tokenizer import VARTokenizer

MANIFEST = "conversion_manifest.json"
ORIGINAL = "released"  # sub-folder of a converted folder: the released files that are not weights
VISUAL_TOKENIZER = "visual_tokenizer"
SMALL_FILES = ("*.json", "*.model", "*.jinja")

DESCRIPTION = """\
Rewrite a released ARGenSeg checkpoint as a native folder, or back, bit for bit.

You may not need this: ARGenSegForConditionalGeneration.from_pretrained(SRC) and
ARGenSegProcessor.from_pretrained(SRC) read a released folder as it is. Converting pays when the folder is loaded often,
published, or opened with AutoModelForImageTextToText, AutoProcessor and pipeline.

SRC holds config.json (model_type internvl_chat), model.safetensors or its shards with an index, and tokenizer.model
with added_tokens.json (or tokenizer.json). The VQ-VAE is part of the weights, or lies there as vae_ch160v4096z32.pth.
"""
EPILOG = f"""\
examples:
  python -m modeling_argenseg.conversion_argenseg ARGenSeg-8B argenseg-8b
  python -m modeling_argenseg.conversion_argenseg --to-released argenseg-8b ARGenSeg-8B-again

DST is new: an existing one is never touched. The work is done in a hidden folder beside it, so DST appears whole or not
at all, also after Ctrl-C. Needed: as much free disk as SRC takes; memory for a few tensors, not for the model.
DST/{MANIFEST} lists every tensor written, with its file, dtype, shape and SHA-256. DST/{ORIGINAL}/ keeps the released
configuration and tokenizer, which --to-released puts back.
"""


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `target` if all goes well and vanishes if not."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; choose another name, or remove it yourself")
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        yield staging
        if os.path.lexists(target):
            raise FileExistsError(f"{target} has appeared meanwhile, and is left as it is")
        os.rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_folder(
    folder: Path, shards: list[dict[str, PlannedTensor]], manifest: dict[str, dict], count: Callable[[int], Any]
) -> None:
    """Write `model.safetensors`, or numbered shards and their index, and note every tensor in the manifest.

    Args:
        folder: where to; exists. Names in the manifest are relative to its staging folder.
        shards: the tensors of each file.
        count: called with the bytes of each tensor when it is on disk.
    """
    weight_map: dict[str, str] = {}
    inside = "" if folder.name != VISUAL_TOKENIZER else VISUAL_TOKENIZER + "/"
    for number, plan in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for key, nbytes, digest in write_safetensors(folder / name, plan):
            weight_map[key] = name
            dtype = str(plan[key].dtype).removeprefix("torch.")
            manifest[inside + key] = {
                "file": inside + name, "dtype": dtype, "shape": list(plan[key].shape), "sha256": digest,
            }  # fmt: skip
            count(nbytes)
    if len(shards) > 1:
        total = sum(planned.nbytes for plan in shards for planned in plan.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def by_file(plan: Mapping[str, PlannedTensor], files: Mapping[str, Path]) -> list[dict[str, PlannedTensor]]:
    """The tensors of `plan` in the shards of the files they come from."""
    shards: dict[Path, dict[str, PlannedTensor]] = {}
    for key, planned in plan.items():
        shards.setdefault(files[key], {})[key] = planned
    return [shards[file] for file in sorted(shards)]


def convert_folder(source: Path, target: Path) -> ARGenSegConfig:
    """Released to native.

    Raises:
        ValueError: `source` is no released checkpoint, or something in it is missing or broken.
        FileExistsError: `target` exists.
    """
    released = find_released(source) if source.is_dir() else None
    if released is None:
        raise ValueError(f"{source} is no released checkpoint: needed is a folder with model_type internvl_chat")
    released.check()
    config = released.config
    with torch.device("meta"):
        sizes_only = VARTokenizer(config.visual_tokenizer_config)
    processor = PROCESSOR_MAPPING[ARGenSegConfig].from_pretrained(source, vq_model=sizes_only)
    processor._set_visual_tokenizer(None)  # its weights are copied below, without loading them
    tensors = released.model_tensors()
    model = {name: PlannedTensor(lazy.dtype, lazy.shape, lazy.read) for name, lazy in tensors.items()}
    visual = {key: _copy_of(entry) for key, entry in released.visual_tokenizer_tensors().items()}
    with staged_folder(target) as folder:
        shards = by_file(model, {name: lazy.entry.file for name, lazy in tensors.items()})
        _write_weights(folder, {"": shards, VISUAL_TOKENIZER: [visual]}, source)
        config.save_pretrained(folder)
        released.generation_config.save_pretrained(folder)
        visual_config = config.visual_tokenizer_config
        visual_config.architectures, visual_config.dtype = ["VARTokenizer"], "float32"
        visual_config.save_pretrained(folder / VISUAL_TOKENIZER)
        processor.save_pretrained(folder)
        _copy_small_files((released.folder, tokenizer_folder(released.folder)), folder / ORIGINAL)
    return config


def revert_folder(source: Path, target: Path) -> ARGenSegConfig:
    """Native to released.

    Raises:
        ValueError: `source` is no native folder, not of the released architecture, or something in it is missing.
        FileExistsError: `target` exists.
    """
    from .conversion_argenseg import revert_config

    if not (source / "config.json").exists() or _model_type(source) != ARGenSegConfig.model_type:
        raise ValueError(f"{source} is no native folder: needed is a config.json of model_type argenseg")
    config = ARGenSegConfig.from_pretrained(source)
    config_json = revert_config(config)
    plan, files = _released_plan(source, config)
    with staged_folder(target) as folder:
        _write_weights(folder, {"": by_file(plan, files)}, source)
        if (source / ORIGINAL / "config.json").exists():
            _copy_small_files((source / ORIGINAL,), folder)
        else:
            _write_json(folder / "config.json", config_json)
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
                if (source / name).exists():
                    shutil.copyfile(source / name, folder / name)
        written = find_released(folder)
        if written is not None:
            written.check()
    return config


def _released_plan(source: Path, config: ARGenSegConfig) -> tuple[dict[str, PlannedTensor], dict[str, Path]]:
    """Every released tensor, from the one or three native ones it is made of, and the file that these lie in."""
    from .conversion_argenseg import convert_tensor, revert_state_dict

    native = {_flat(key): entry for key, entry in read_folder(source).items()}
    visual = read_folder(source / VISUAL_TOKENIZER)
    last = max(entry.file for entry in native.values())
    plan, files = {}, {}

    def find(place: Mapping[str, StoredTensor], name: str, folder: Path) -> StoredTensor:
        if name not in place:
            raise ValueError(f"{folder} lacks {name}")
        return place[name]

    for key, shape in released_shapes(config).items():
        if key.startswith(PREFIX):
            plan[key] = _copy_of(find(visual, key[len(PREFIX) :], source / VISUAL_TOKENIZER))
            files[key] = last
            continue
        names = convert_tensor(key, torch.empty(shape, device="meta"), config)
        parts = {name: find(native, name, source) for name in names}

        def make(key: str = key, parts: dict[str, StoredTensor] = parts) -> torch.Tensor:
            return revert_state_dict({name: part.read() for name, part in parts.items()}, {}, config)[key]

        first = next(iter(parts.values()))
        plan[key], files[key] = PlannedTensor(first.dtype, shape, make), first.file
    return plan, files


def _flat(key: str) -> str:
    """Names as transformers may write them for an InternVL inside another model, as those of the module tree."""
    return key.replace("model.vlm.language_model.model.", "model.vlm.language_model.")


def _copy_of(entry: StoredTensor) -> PlannedTensor:
    return PlannedTensor(entry.dtype, entry.shape, entry.read)


def _write_weights(folder: Path, parts: dict[str, list[dict[str, PlannedTensor]]], source: Path) -> None:
    """All weights, with a progress bar, and the manifest."""
    total = sum(planned.nbytes for shards in parts.values() for plan in shards for planned in plan.values())
    free = shutil.disk_usage(folder).free
    if free < total:
        raise ValueError(f"{folder.parent} has {free / 1e9:.1f} GB free, and {total / 1e9:.1f} GB are needed")
    manifest: dict[str, dict] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"converting {source.name}") as bar:
        for name, shards in parts.items():
            (folder / name).mkdir(exist_ok=True)
            write_folder(folder / name, shards, manifest, bar.update)
    _write_json(folder / MANIFEST, {"source": source.name, "tensors": manifest})


def _copy_small_files(sources: tuple[Path, ...], target: Path) -> None:
    target.mkdir(exist_ok=True)
    for source in sources:
        for file in sorted(file for pattern in SMALL_FILES for file in source.glob(pattern)):
            if file.name not in (INDEX, MANIFEST):
                shutil.copyfile(file, target / file.name)


def _model_type(folder: Path) -> str | None:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def count_parameters(config: ARGenSegConfig) -> tuple[int, int]:
    """Numbers in the model and in the VQ-VAE, by a walk over the released shapes."""
    sizes = {key: torch.Size(shape).numel() for key, shape in released_shapes(config).items()}
    visual = sum(size for key, size in sizes.items() if key.startswith(PREFIX))
    return sum(sizes.values()) - visual, visual


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the command, and what it teaches."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_argenseg.conversion_argenseg",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="folder to read; it is not changed")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make; must not exist")
    parser.add_argument("--to-released", action="store_true", help="the other way: SRC is native, DST becomes released")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line. Whatever goes wrong ends in one line, a non-zero exit status, and no target."""
    options = make_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; nothing is left behind"))
    run = revert_folder if options.to_released else convert_folder
    try:
        config = run(options.source, options.target)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing is left behind")
    model, visual = count_parameters(config)
    print(f"{options.target}: {model:,} parameters, and {visual:,} in the VQ-VAE; checksums in {MANIFEST}")


__all__ = ["ReleasedCheckpoint", "convert_folder", "count_parameters", "main", "make_parser", "revert_folder"]
