"""What a result depends on, in a file beside it, and short hashes of data and models for that file."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ANEW = "Give another --output, or --overwrite to begin anew"
FINGERPRINT_VALUES = 256  # of every parameter
WHOLE_BYTES, EDGE_BYTES = 1 << 28, 1 << 16  # data up to this are read as a whole; otherwise the edges of every file
WHOLES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new run; those of a run that goes on stay."""
    if not path.exists():
        write_json(path, settings)


def check_settings(path: Path, settings: dict[str, Any], aside: Sequence[str] = (), mend: str = ANEW) -> None:
    """Makes sure that a run goes on with the settings that it began with.

    Args:
        aside: what stands in the file and is no setting.
        mend: what to do where they are others.

    Raises:
        ValueError: a setting differs, and what was made under both would not belong together.
    """
    before, settings = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    before = {name: value for name, value in before.items() if name not in aside}
    changes = list(_differences(before, settings))
    if changes:
        told = "; ".join(f"{name} was {old!r} and is now {new!r}" for name, old, new in changes)
        raise ValueError(f"{path.parent} holds a run with other settings: {told}. {mend}")


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def hash_texts(texts: Iterable[str]) -> str:
    """A short hash of texts in their order, such as sample ids."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


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
