"""Images that training must not see: those of the tasks' validation and test splits that come from COCO train2014.

RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO are made of COCO *train2014*, their validation and test splits too: a model
that was trained on all of train2014 (or train2017, whose ids are the same) has seen their images.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from . import refcoco
from .task import MissingData, load_task, open_source

if TYPE_CHECKING:
    from datasets import Dataset

TASKS = ("refcoco", "refcoco_plus", "refcocog", "refcoco_google", "refcocog_google", "grefcoco")
FILE_NAME = re.compile(r"(?<!\d)(\d{12})(?=(?:_\d+)?\.(?:jpg|jpeg|png))", re.IGNORECASE)


def held_out_images(data: str | Path, tasks: Iterable[str] = TASKS) -> tuple[set[int], list[str]]:
    """COCO ids of all images in the validation and test splits of the tasks whose annotations are in `data`.

    Returns:
        the ids, and the splits that were read, as `task/split`. Tasks that are not there are left out.

    Raises:
        MissingData: none of them is there.
    """
    images: set[int] = set()
    read: list[str] = []
    nameless: list[str] = []
    for name in tasks:
        task = load_task(name)
        for split in task.splits:
            try:
                source = open_source(task, data, split)
            except MissingData:
                nameless += [one for layout in task.layouts for one in layout.find_nameless(Path(data), split)]
                continue
            images |= {int(reference.image_id) for reference in refcoco.read_references(source)}
            read.append(f"{name}/{split}")
    if not read:
        hint = (
            f"; {nameless[0]} may be of several: move it to refcoco/{nameless[0]}, or whose it is" if nameless else ""
        )
        raise MissingData(
            f"none of {', '.join(tasks)} is in {data}; `tasks show refcoco` tells where to get them{hint}"
        )
    return images, read


def splits_not_read(read: Iterable[str], tasks: Iterable[str] = TASKS) -> list[str]:
    """The other splits of the tasks, as `task/split`: their images are not held out."""
    known = set(read)
    return [one for name in tasks for split in load_task(name).splits if (one := f"{name}/{split}") not in known]


def write_exclusions(path: Path, images: set[int], read: list[str]) -> None:
    """Writes the list: a comment that says what it covers, and one COCO id a line, in order."""
    lines = [f"# COCO ids of the images of {', '.join(read)}", *(str(image) for image in sorted(images))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_exclusions(path: Path) -> set[int]:
    """A list that `write_exclusions` wrote. Raises ValueError, with the line, for what is no id."""
    images = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("#") or not line.strip():
            continue
        if not line.strip().isdigit():
            raise ValueError(f"{path}:{number}: {line!r} is no id of a COCO image")
        images.add(int(line))
    return images


def leave_out(rows: "Dataset", path: Path, progress: bool = True) -> "Dataset":
    """Rows of `load_mask_data` whose images are not in a list that `write_exclusions` wrote; prints how many are not.

    Raises:
        ValueError: the list cannot be read, no row's image has the file name of one of COCO, or no row is left.
    """
    if not path.is_file():
        raise ValueError(f"--leave_out: there is no file {str(path)!r}; `trl_recipes.tasks leakage` writes one")
    held_out = read_exclusions(path)
    names = [FILE_NAME.search(name) for name in _file_names(rows)]
    if not any(names):
        raise ValueError(
            "--leave_out: no image has a file name of COCO (twelve digits and .jpg), so none can be told from the list"
        )
    kept = [place for place, name in enumerate(names) if name is None or int(name[1]) not in held_out]
    if not kept:
        raise ValueError(f"--leave_out: {path} names every image of the training data")
    if progress:
        print(f"left out {len(rows) - len(kept)} of {len(rows)} samples, whose images are in {path}")
        if nameless := names.count(None):
            unknown = "have no file name of COCO: nothing tells whether the list names them"
            print(f"WARNING: {nameless} samples are kept whose images {unknown}")
    return rows.select(kept)


def _file_names(rows: "Dataset") -> list[str]:
    """The name of each row's image file, or of what it was in a table; empty where it has none."""
    from datasets import Image  # which no other task needs

    stored = rows.select_columns("image").cast_column("image", Image(decode=False))
    return [Path(one["image"]["path"] or "").name for one in stored]


def find_leaks(training_file: Path, held_out: set[int]) -> set[int]:
    """Held-out images that a file of training data names (JSON, JSONL, CSV, a list: any text with COCO's file names).

    Raises:
        ValueError: the file names no image of COCO at all, so that "no leak" would mean nothing.
    """
    found: set[int] = set()
    with training_file.open(encoding="utf-8", errors="replace") as file:
        while text := file.read(1 << 24):
            text += file.readline()  # up to the end of a line, so that no name is cut
            found |= {int(one) for one in FILE_NAME.findall(text)}
    if not found:
        raise ValueError(f"{training_file} names no image of COCO (twelve digits and .jpg): there is nothing to check")
    return found & held_out
