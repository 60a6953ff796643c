"""Sweet Home 3D's models: reads the catalogues and has each model rendered by a process of its own.

A model can crash or hang the renderer, so rendering happens in `render_models`, which is started again behind the
model that felled it. What has been rendered is kept on disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .rooms import read_properties
from .rows import UNREADABLE, Workplace

CATALOGUE = "PluginFurnitureCatalog.properties"
PATIENCE = 120.0  # seconds for one model
FAILED, CURRENT = "failed.json", "current.txt"


@dataclass(frozen=True)
class Model:
    """One piece of a catalogue: `file` is its OBJ file inside `archive`, `turned` a 3x3 rotation, row by row."""

    identifier: str
    archive: Path
    file: str
    author: str
    licence: str
    turned: tuple[float, ...] = (1, 0, 0, 0, 1, 0, 0, 0, 1)

    @property
    def slug(self) -> str:
        """The identifier as a file name."""
        return "".join(letter if letter.isalnum() else "_" for letter in self.identifier)


def read_catalogues(folder: Path, problems: list[str]) -> list[Model]:
    """The models of all `.sh3f` catalogues in a folder."""
    models = []
    for archive in sorted(folder.glob("*.sh3f")):
        try:
            with zipfile.ZipFile(archive) as catalogue:
                entries = read_properties(catalogue.read(CATALOGUE).decode("latin-1"))
        except (*UNREADABLE, zipfile.BadZipFile) as error:
            problems.append(f"{archive.name}: {error}")
            continue
        numbers = [key[3:] for key in entries if key.startswith("id#") and f"model#{key[3:]}" in entries]
        for number in numbers:
            turned = entries.get(f"modelRotation#{number}", "1 0 0 0 1 0 0 0 1")
            models.append(
                Model(
                    identifier=entries[f"id#{number}"],
                    archive=archive,
                    file=entries[f"model#{number}"].lstrip("/"),
                    author=entries.get(f"creator#{number}", "not stated"),
                    licence=entries.get(f"license#{number}", entries.get("license", "not stated")),
                    turned=tuple(float(value) for value in turned.split()),
                )
            )
    return models


def rendered_models(work: Workplace, wanted: dict[str, str]) -> Iterator[tuple[Model, str, list[Image.Image]]]:
    """Every wanted model with its noun and its pictures (RGBA, cut out)."""
    folder = work.unpacked["sweethome3d-furniture"] / "usr/share/sweethome3d/furniture"
    models = {model.identifier: model for model in read_catalogues(folder, work.problems)}
    chosen = [models[name] for name in wanted if name in models]
    failed = _render(chosen, work.folder, work.views)
    work.problems += [f"{name}: {reason}" for name, reason in failed.items()]
    work.problems += [f"{name}: it is not in the package" for name in wanted if name not in models]
    for model in chosen:
        views = sorted((work.folder / model.slug).glob("*.webp"))
        if views:
            yield model, wanted[model.identifier], [Image.open(view).convert("RGBA") for view in views]


def _render(models: list[Model], folder: Path, views: int) -> dict[str, str]:
    # Returns the models that cannot be rendered, and why.
    folder.mkdir(parents=True, exist_ok=True)
    failures = folder / FAILED
    failed: dict[str, str] = json.loads(failures.read_text(encoding="utf-8")) if failures.is_file() else {}
    with tqdm(total=len(models), desc="furniture", unit="model") as bar:
        while waiting := [model for model in models if not _done(folder, model) and model.identifier not in failed]:
            reason = _run_worker(waiting, models, folder, views, bar)
            current = folder / CURRENT
            if reason is None or not current.is_file():
                if [model for model in waiting if not _done(folder, model)]:
                    raise ValueError(
                        f"The renderer does not start: {reason or 'no picture, no message'}. Pass --skip furniture."
                    )
                continue
            failed[current.read_text(encoding="utf-8")] = reason
            failures.write_text(json.dumps(failed, indent=1), encoding="utf-8")
            current.unlink()
        bar.update(len(models) - bar.n)
    return failed


def _done(folder: Path, model: Model) -> bool:
    return (folder / model.slug).is_dir()


def _run_worker(waiting: list[Model], models: list[Model], folder: Path, views: int, bar: tqdm) -> str | None:
    # Renders until all is done (None) or one model brings the process down (the reason).
    jobs = folder / "jobs.json"
    jobs.write_text(
        json.dumps([[one.identifier, str(one.archive), one.file, one.slug, one.turned] for one in waiting]),
        encoding="utf-8",
    )
    (folder / CURRENT).unlink(missing_ok=True)
    command = [sys.executable, "-m", f"{__package__}.render_models", str(jobs), str(folder), str(views)]
    with (folder / "renderer.txt").open("w", encoding="utf-8") as said:
        worker = subprocess.Popen(command, stdout=said, stderr=said, cwd=Path(__file__).parents[2])
        try:
            number, since = -1, time.monotonic()
            while worker.poll() is None:
                bar.update(sum(_done(folder, model) for model in models) - bar.n)
                if bar.n != number:
                    number, since = bar.n, time.monotonic()
                if time.monotonic() - since > PATIENCE:
                    return f"it took the renderer more than {PATIENCE:.0f} s"
                time.sleep(0.5)
        finally:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
    if worker.returncode == 0:
        return None
    lines = (folder / "renderer.txt").read_text(errors="replace").strip().splitlines()
    return f"the renderer ended with {worker.returncode}" + (f" ({lines[-1]})" if lines else "")
