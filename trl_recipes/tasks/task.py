"""Tasks: what is asked, of which data, under which protocol. One YAML file each in `definitions/`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

DEFINITIONS = Path(__file__).parent / "definitions"
ANSWERS = ("mask", "box", "classes", "text")


class MissingData(ValueError):
    """Files of a data set are not there; the message says which, and where to get them."""


@dataclass(frozen=True)
class Layout:
    """One of the forms in which a data set is handed around.

    Attributes:
        format: name of the form, for the reader.
        files: glob patterns below the data folder, with `{split}`; each must match something.
        splits: names of splits in this form, where they differ.
        folders: names of the data set's own folder, where other data sets have files of the same names: the files must
            lie in a folder of such a name in the data folder, or the data folder must be called so.
    """

    format: str
    files: tuple[str, ...]
    splits: dict[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()

    def find(self, root: Path, split: str) -> dict[str, list[Path]]:
        """Pattern -> the files that match it, sorted."""
        places = [f"{name}/" for name in self.folders]
        if not self.folders or root.absolute().name in self.folders or root.resolve().name in self.folders:
            places.append("")
        found = [self._find_in(place, root, split) for place in places]
        return next((files for files in found if all(files.values())), found[0])

    def find_nameless(self, root: Path, split: str) -> list[str]:
        """Patterns that match in the data folder, where nothing says that they are of this data set."""
        return [pattern for pattern, files in self._find_in("", root, split).items() if self.folders and files]

    def _find_in(self, place: str, root: Path, split: str) -> dict[str, list[Path]]:
        named = [place + pattern.replace("{split}", self.splits.get(split, split)) for pattern in self.files]
        return {pattern: sorted(root.glob(_escape(pattern))) for pattern in named}


def _escape(pattern: str) -> str:
    return pattern.replace("[", "[[]")


@dataclass(frozen=True)
class Task:
    """A task as its YAML file tells it; `python -m trl_recipes.tasks show NAME` prints one.

    Attributes:
        name, version: the version goes up with any change that may change a number.
        title: one line.
        reader: which reader of `trl_recipes.tasks` turns the files into samples.
        answer: "mask" (one mask a sample), "box" (the box round the mask), "classes" (one mask a class, made into a
            label map) or "text".
        splits: the first is the default.
        protocols: name -> the protocol in words; the first is the default.
        prompts: protocol -> what is asked. `{text}` is the sample's text, `{request}` the model's own wording of a
            segmentation request for it.
        prompts_of_kinds: kind -> what is asked in samples of this kind instead.
        metrics: names in `trl_recipes.evaluation.scoring`.
        targets: "always" if something is there in every sample, so that an answer without a mask is invalid;
            "sometimes" if words instead of a mask can be right.
        layouts: forms of the annotations that are read; the first one that is complete is used.
        images: folders below the data folder where images may lie; the first that exists is used.
        source: where to get the data.
        archives: published downloads with checksums: `file`, `url`, and `md5`, `sha1` or `sha256`.
        counts: split -> protocol -> samples of the complete data set, where publicly known.
        options: settings of the reader; the command's `--option name=value` changes them, and results say so.
    """

    name: str
    version: int
    title: str
    reader: str
    answer: str
    splits: tuple[str, ...]
    protocols: dict[str, str]
    prompts: dict[str, str]
    metrics: tuple[str, ...]
    targets: str
    source: str
    layouts: tuple[Layout, ...]
    images: tuple[str, ...] = ("",)
    archives: tuple[dict[str, str], ...] = ()
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    prompts_of_kinds: dict[str, str] = field(default_factory=dict)


def task_names() -> list[str]:
    return sorted(path.stem for path in DEFINITIONS.glob("*.yaml"))


def load_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: there is no such task.
    """
    if name not in task_names():
        raise ValueError(f"no task {name!r}; there are: {', '.join(task_names())}")
    return read_task(DEFINITIONS / f"{name}.yaml")


def read_task(path: Path) -> Task:
    """A task from its YAML file.

    Raises:
        ValueError: a field is missing, unknown, or does not fit the others; the message names file and field.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {one.name for one in fields(Task)}
    unknown = sorted(content.keys() - known)
    if unknown:
        raise ValueError(f"{path.name}: unknown field {unknown[0]!r}; a task has {', '.join(sorted(known))}")
    content["layouts"] = tuple(
        Layout(one["format"], tuple(one["files"]), one.get("splits", {}), tuple(one.get("folders", ())))
        for one in content.get("layouts", [])
    )
    for name in ("splits", "metrics", "images", "archives"):
        if name in content:
            content[name] = tuple(content[name])
    try:
        task = Task(**content)
    except TypeError as error:
        raise ValueError(f"{path.name}: {error}") from None
    _check(task, path)
    return task


def _check(task: Task, path: Path) -> None:
    checks = {
        "name": task.name == path.stem,
        "answer": task.answer in ANSWERS,
        "targets": task.targets in ("always", "sometimes"),
        "prompts": task.prompts.keys() == task.protocols.keys()
        and all("{text}" in one or "{request}" in one for one in task.prompts.values()),
        "splits": bool(task.splits),
        "protocols": bool(task.protocols),
        "counts": set(task.counts) <= set(task.splits),
    }
    for name, fine in checks.items():
        if not fine:
            raise ValueError(f"{path.name}: the field {name!r} does not fit: {getattr(task, name)!r}")


@dataclass(frozen=True)
class Source:
    """What a reader gets: the task, one split under one protocol, and the files.

    Attributes:
        files: the files of the layout, in the order of its patterns.
        format: of the layout.
        images: folder of the images.
    """

    task: Task
    root: Path
    split: str
    protocol: str
    format: str
    files: tuple[tuple[Path, ...], ...]
    images: Path
    options: dict[str, Any]

    def file(self, place: int = 0) -> Path:
        """The one file that the pattern at `place` matched."""
        return self.files[place][0]


def open_source(
    task: Task,
    data: str | Path,
    split: str | None = None,
    protocol: str | None = None,
    images: str | Path | None = None,
    options: dict[str, Any] | None = None,
) -> Source:
    """The files of a task below `data`, found and named.

    Args:
        images: folder of the images, if they are in none of the usual places.
        options: changes to `task.options`.

    Raises:
        MissingData: files are missing.
        ValueError: no such split, protocol or option.
    """
    split = _chosen("split", split, task.splits, task.name)
    protocol = _chosen("protocol", protocol, tuple(task.protocols), task.name)
    for name in options or {}:
        _chosen("option", name, tuple(task.options), task.name)
    root = Path(data)
    found = [layout.find(root, split) for layout in task.layouts]
    complete = next((i for i, files in enumerate(found) if all(files.values())), None)
    if complete is None:
        raise MissingData(_what_is_missing(task, root, split, found))
    folder = Path(images) if images is not None else _image_folder(task, root)
    return Source(
        task,
        root,
        split,
        protocol,
        task.layouts[complete].format,
        tuple(tuple(paths) for paths in found[complete].values()),
        folder,
        task.options | (options or {}),
    )


def _chosen(kind: str, name: str | None, known: Sequence[str], task: str) -> str:
    if name is None:
        return known[0]
    if name not in known:
        raise ValueError(f"{task} has no {kind} {name!r}; it has: {', '.join(known) or 'none'}")
    return name


def _image_folder(task: Task, root: Path) -> Path:
    return next((root / name for name in task.images if (root / name).is_dir()), root)


def _what_is_missing(task: Task, root: Path, split: str, found: list[dict[str, list[Path]]]) -> str:
    lines = [f"the data of {task.name} (split {split}) is not complete in {root}. One of these forms is needed:"]
    for layout, files in zip(task.layouts, found, strict=True):
        lines.append(f"  {layout.format}:")
        lines += [f"    {'found  ' if paths else 'MISSING'}  {pattern}" for pattern, paths in files.items()]
    for layout in task.layouts:
        lines += [
            f"  {pattern} is there, but several data sets have such files: move it to {layout.folders[0]}/{pattern}"
            for pattern in layout.find_nameless(root, split)
        ]
    if task.images != ("",):
        lines.append(f"  and the images, in one of: {', '.join(task.images)} (or --images DIR)")
    lines += ["Where to get it:", *("  " + line for line in task.source.strip().splitlines())]
    for archive in task.archives:
        sums = [f"{kind} {archive[kind]}" for kind in ("md5", "sha1", "sha256") if kind in archive]
        lines.append(f"  {archive['file']}: {archive['url']} ({', '.join(sums)})")
    return "\n".join(lines)


def verify_archives(task: Task, root: Path) -> list[str]:
    """Names of the task's published archives that lie in `root` and are what was published.

    Raises:
        ValueError: one has another checksum: the download is broken, or the data was changed since.
    """
    verified = []
    for archive in task.archives:
        path = root / archive["file"]
        if not path.is_file():
            continue
        for kind in ("md5", "sha1", "sha256"):
            if kind not in archive:
                continue
            with path.open("rb") as file:
                found = hashlib.file_digest(file, kind).hexdigest()
            if found != archive[kind]:
                raise ValueError(f"{path} has the {kind} {found}, not {archive[kind]}: download it again")
            verified.append(archive["file"])
    return verified
