"""Where a result comes from: the code, the versions, the model, the settings that numbers depend on."""

import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..settings_files import check_settings, fingerprint, hash_texts, write_json, write_settings
from ..tasks import Samples
from .store import PATTERN

PACKAGES = ("argenseg", "torch", "transformers", "accelerate", "numpy", "pillow", "pycocotools")
ANSWERED_BY = "answered_by"  # no setting, but kept with them
LOOKED_AT = 64  # samples whose image and text are compared
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


def answered_by(path: Path, now: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The code (see `code`) of all predictions of a run, the first first; `now` is added if it is another."""
    run = json.loads(path.read_text(encoding="utf-8"))
    if now is not None and now not in run[ANSWERED_BY]:
        run[ANSWERED_BY].append(now)
        write_json(path, run)
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
    check_settings(path, settings, aside=(ANSWERED_BY,))
