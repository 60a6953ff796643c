"""Where a result comes from: the code, the versions, the model, the settings that numbers depend on."""

import hashlib
import itertools
import json
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..tasks import Samples
from .store import PATTERN

PACKAGES = ("argenseg", "torch", "transformers", "accelerate", "numpy", "pillow", "pycocotools")
FINGERPRINT_VALUES = 256  # of every parameter
WHOLE_BYTES, EDGE_BYTES = 1 << 28, 1 << 16  # data up to this are read as a whole; otherwise the edges of every file
ANSWERED_BY = "answered_by"  # no setting, but kept with them
LOOKED_AT = 64  # samples whose image and text are compared
WHOLES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
UNSAID = ("_name_or_path", "_from_model_config", "transformers_version", "auto_map")  # where it lies, who wrote it


def commit() -> dict[str, Any]:
    """The commit of the checkout that this code runs from, and whether files differ from it; nulls without one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers can depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def code() -> dict[str, Any]:
    """What answers or scores: `commit`, and the versions."""
    return {**commit(), "versions": versions()}


def fingerprint(model: torch.nn.Module) -> str:
    """A short hash of all parameters and buffers: names, shapes, some values, and the sum of all bits as whole numbers,
    which no order of adding changes. Another training step gives another one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(itertools.chain(model.named_parameters(), model.named_buffers())):
        flat = tensor.detach().flatten()
        chosen = flat[:: max(1, len(flat) // FINGERPRINT_VALUES)].float().cpu().numpy()
        total = int(flat.view(WHOLES[flat.element_size()]).sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total}".encode() + chosen.tobytes())
    return digest.hexdigest()[:16]


def model_settings(model: Any) -> dict[str, Any]:
    """What of a model decides its answers."""
    return {
        "weights": fingerprint(model),
        "model_config": _hash_json(model.config.to_dict()),
        "generation_config": _said(model.generation_config.to_diff_dict()),
    }


def processor_settings(processor: Any) -> dict[str, Any]:
    """What of a processor decides what a model is shown, and what is read in its answers."""
    pictures = processor.visual_tokenizer
    return {
        **_said(processor.to_dict()),
        "image_processor": _said(processor.image_processor.to_dict()),
        "chat_template": _hash_json(processor.chat_template),
        "text_tokenizer": hash_texts([processor.tokenizer.backend_tokenizer.to_str()]),
        "visual_tokenizer": None if pictures is None else fingerprint(pictures),
        "visual_tokenizer_config": None if pictures is None else _hash_json(pictures.config.to_dict()),
    }


def _said(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in UNSAID}


def _hash_json(content: Any) -> str:
    content = _said(content) if isinstance(content, dict) else content
    return hash_texts([json.dumps(content, sort_keys=True, default=str)])


def hash_files(paths: Sequence[Path]) -> str:
    """A short hash of files' names and contents; of many bytes, of their sizes and edges."""
    digest, whole = hashlib.sha256(), sum(path.stat().st_size for path in paths) <= WHOLE_BYTES
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(size if whole else EDGE_BYTES))
            if not whole:
                file.seek(max(0, size - EDGE_BYTES))
                digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()[:16]


def hash_samples(samples: Samples) -> str:
    """A short hash of what samples ask: text, image and prompt picture. Of many, some are looked at, evenly spread."""
    digest = hashlib.sha256()
    for place in sorted({round(i) for i in np.linspace(0, len(samples) - 1, min(LOOKED_AT, len(samples)))}):
        sample = samples[place]
        digest.update(f"{sample.id} {sample.text}\n".encode())
        try:
            for picture in (sample.load_image(), *([sample.load_prompt()] if sample.load_prompt else [])):
                digest.update(repr(picture.size).encode() + picture.tobytes())
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error
    return digest.hexdigest()[:16]


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new run; those of a run that goes on stay."""
    if not path.exists():
        _write_json(path, settings)


def start_answers(path: Path, settings: dict[str, Any]) -> None:
    """`write_settings` of an evaluation, which also keeps by what code its predictions were made (`answered_by`).

    Raises:
        ValueError: there are predictions, but no settings of theirs.
    """
    if not path.exists() and any(path.parent.glob(PATTERN)):
        raise ValueError(
            f"{path.parent} holds predictions, but no {path.name} that says of which run. Give another --output, "
            "or --overwrite to begin anew"
        )
    write_settings(path, {**settings, ANSWERED_BY: []})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def answered_by(path: Path, now: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The code (see `code`) of all predictions of a run, the first first; `now` is added if it is another."""
    run = json.loads(path.read_text(encoding="utf-8"))
    if now is not None and now not in run[ANSWERED_BY]:
        run[ANSWERED_BY].append(now)
        _write_json(path, run)
    return run[ANSWERED_BY]


def check_answers(path: Path, settings: dict[str, Any]) -> None:
    """`check_settings` of an evaluation.

    Raises:
        ValueError: a setting differs, or the run is one of before all settings were written down.
    """
    if ANSWERED_BY not in json.loads(path.read_text(encoding="utf-8")):
        raise ValueError(
            f"{path} was written by an earlier version, without all settings that its predictions depend on. Give "
            "another --output, or --overwrite to begin anew"
        )
    check_settings(path, settings)


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Makes sure that a run goes on with the settings that it began with.

    Raises:
        ValueError: a setting differs, and what was made under both would not belong together.
    """
    before, settings = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    before.pop(ANSWERED_BY, None)
    changes = list(_differences(before, settings))
    if changes:
        told = "; ".join(f"{name} was {old!r} and is now {new!r}" for name, old, new in changes)
        raise ValueError(
            f"{path.parent} holds a run with other settings: {told}. Give another --output, or --overwrite to begin "
            "anew"
        )


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new


def hash_texts(texts: Iterable[str]) -> str:
    """A short hash of texts in their order, such as sample ids."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
