"""Semantic segmentation with a closed vocabulary: every class of it is asked for in every image."""

import re
from functools import partial
from pathlib import Path

import numpy as np

from .samples import Sample, Samples, open_labels, open_rgb
from .task import Source


def read(source: Source) -> Samples:
    """One sample for each (image, class); samples of an image follow one another.

    Options of the task: `names`, the vocabulary (empty: it is in the second file); `offset`, the label of the first
    name; `void`, labels that are dropped; `without`, labels that the data set does not use; `suffix` of images.
    """
    numbers, names = vocabulary(source)
    maps = source.files[0]
    ids = [f"{path.stem}#{place:03d}" for path in maps for place in range(len(names))]

    def make(place: int) -> Sample:
        path, label = maps[place // len(names)], place % len(names)
        return Sample(
            id=ids[place],
            text=names[label],
            load_image=partial(open_rgb, source.images / (path.stem + source.options["suffix"])),
            load_labels=partial(class_map, path, tuple(numbers), tuple(source.options["void"])),
            group=path.stem,
            label=label,
        )

    return Samples(ids, make)


def vocabulary(source: Source) -> tuple[list[int], list[str]]:
    """The label in the maps and the name of every class, in the order of the classes.

    Raises:
        ValueError: the file of names has a line without a name.
    """
    options = source.options
    if options["names"]:
        numbered = dict(enumerate(options["names"], options["offset"]))
    else:
        path = source.file(1)
        numbered = {number - 1 + options["offset"]: name for number, name in _numbered_names(path).items()}
    used = {number: name for number, name in numbered.items() if number not in options["without"]}
    return list(used), list(used.values())


def _numbered_names(path: Path) -> dict[int, str]:
    """Lines `12: street sign`, or ADE20K's table of which the last column has `door, double door`.

    Line numbers start at 1; `0: unlabeled` is no class. Of several synonyms the first is the name.
    """
    names: dict[int, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = re.match(r"\s*(\d+)\s*[:\t]\s*(.+)", line)
        if not line.strip() or line.startswith("Idx"):
            continue
        if found is None:
            raise ValueError(f"{path}:{number}: no number and name in {line!r}")
        if int(found[1]):
            names[int(found[1])] = found[2].split("\t")[-1].split(",")[0].strip()
    return names


def class_map(path: Path, numbers: tuple[int, ...], void: tuple[int, ...]) -> np.ndarray:
    """The label map (H, W) of a file with classes numbered from 0, and -1 where a pixel is void.

    Raises:
        ValueError: a label is neither a class nor void.
    """
    labels = open_labels(path)
    classes = np.full(labels.shape, -2, np.int64)
    for place, number in enumerate(numbers):
        classes[labels == number] = place
    classes[np.isin(labels, void)] = -1
    if (classes == -2).any():
        raise ValueError(f"{path}: the label {int(labels[classes == -2][0])} is neither a class nor void")
    return classes
