"""Where a result comes from: the code, the versions, the model, the settings that numbers depend on."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("argenseg", "torch", "transformers", "accelerate", "numpy", "pillow", "pycocotools")
FINGERPRINT_VALUES = 256  # of every parameter


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


def fingerprint(model: torch.nn.Module) -> str:
    """A short hash of all parameters' names, shapes and some values: another training step gives another one."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        chosen = flat[:: max(1, len(flat) // FINGERPRINT_VALUES)].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + chosen.tobytes())
    return digest.hexdigest()[:16]


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new run; those of a run that goes on stay."""
    if not path.exists():
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        part.replace(path)


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Makes sure that a run goes on with the settings that it began with.

    Raises:
        ValueError: a setting differs; predictions under both would not belong together.
    """
    before, settings = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
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
