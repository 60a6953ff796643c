"""Caches that are arrays (.npy), and what each was made of (.json beside it): for anything else it is made anew."""

import json
from pathlib import Path
from typing import Any

from .settings_files import write_settings


def was_made_of(cache: Path, settings: dict[str, Any]) -> bool:
    """Whether the cache is there and was made of this. One that nothing is said about is taken as it is."""
    described = cache.with_suffix(".json")
    if not cache.exists() or not described.exists():
        return cache.exists()
    before = json.loads(described.read_text(encoding="utf-8"))
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        print(f"{cache} was made with another {', '.join(changed)}: it is made anew")
    return not changed


def start_anew(cache: Path, settings: dict[str, Any]) -> None:
    """Deletes what is there, and says what the cache is going to be made of."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.unlink(missing_ok=True)  # first: killed in between, none is left with the settings of another
    cache.with_suffix(".json").unlink(missing_ok=True)
    write_settings(cache.with_suffix(".json"), settings)
