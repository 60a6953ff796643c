"""Readers of the data formats. Each turns files into `RawSample`s; nothing is opened or checked beyond the text."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Array2D, Dataset, Image, Value

from .coco import read_coco
from .mask_values import split_masks
from .samples import ALIASES, IMAGE_MARKER, MASK_MARKER, BadSample, RawSample, ReaderOptions, Source

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
PROMPT_FILES = ("prompts.csv", "metadata.jsonl", "metadata.csv", "prompts.jsonl")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


# ---------------------------------------------------------------------- rows


def plain_row(row: Any, where: str, root: Path, options: ReaderOptions) -> RawSample:
    """A row with image, prompt and mask, or with `conversations` as the released project writes them.

    Raises:
        BadSample: a field is missing.
    """
    if isinstance(row, BadSample):
        raise row
    if not isinstance(row, dict):
        raise BadSample(where, "", f"not an object with image, prompt and mask, but {type(row).__name__}")
    names: dict[str, Any] = {part: options.find(row, part) for part in ALIASES}
    if names["image"] is None or row[names["image"]] in (None, ""):
        raise BadSample(where, names["image"] or "image", _missing(row, "image"))
    fields = {part: name for part, name in names.items() if name is not None}
    if isinstance(row.get("conversations"), list):
        return _conversation_row(row, where, root, fields)
    prompt = options.prompt if names["prompt"] is None else row[names["prompt"]]
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadSample(where, names["prompt"] or "prompt", _missing(row, "prompt"))
    if names["mask"] is None:
        raise BadSample(where, "mask", _missing(row, "mask") + "; null or [] says that the thing is not there")
    sample = RawSample(where, row[names["image"]], prompt.strip(), split_masks(row[names["mask"]]), None, fields, root)
    if isinstance(row.get("height"), int) and isinstance(row.get("width"), int):
        sample.told_size, sample.told_by = (row["height"], row["width"]), "the row"
    return sample


def _missing(row: dict[str, Any], part: str) -> str:
    return f"no {part} (the row has {', '.join(map(repr, row)) or 'nothing'}; name a column of yours by --columns)"


def _conversation_row(row: dict[str, Any], where: str, root: Path, fields: dict[str, str]) -> RawSample:
    turns = []
    for number, turn in enumerate(row["conversations"]):
        role = ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if role else None
        if not isinstance(text, str):
            raise BadSample(where, f"conversations[{number}]", "a turn needs 'from' (human or gpt) and 'value' (text)")
        turns.append({"role": role or "", "content": re.sub(IMAGE_MARKER + "\n?", "", text)})
    images = sum(str(turn).count(IMAGE_MARKER) for turn in row["conversations"])
    if images > 1 or isinstance(row[fields["image"]], list):
        raise BadSample(where, fields["image"], "several images in one conversation are not supported; give one")
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or turns[-2]["role"] != "user":
        raise BadSample(where, "conversations", "it must end in a request (human) and its answer (gpt)")
    if any(MASK_MARKER in turn["content"] for turn in turns if turn["role"] != "assistant"):
        raise BadSample(where, "conversations", f"only answers (gpt) may hold {MASK_MARKER}")
    masks = split_masks(row[fields["mask"]]) if "mask" in fields else []
    markers = sum(turn["content"].count(MASK_MARKER) for turn in turns)
    if markers != len(masks):
        raise BadSample(
            where, fields.get("mask", "mask"), f"{len(masks)} masks for {markers} {MASK_MARKER} in the text"
        )
    return RawSample(where, row[fields["image"]], turns[-2]["content"].strip(), masks, turns, fields, root)


def _each(read: Callable[[str, Any], RawSample], rows: Iterable[tuple[str, Any]]) -> Iterator[RawSample | BadSample]:
    """The samples of rows (where, row), with an error in the place of one that is broken, so that reading goes on."""
    for where, row in rows:
        try:
            yield read(where, row)
        except BadSample as error:
            yield error


# ---------------------------------------------------------------------- files


def read_jsonl(path: Path, options: ReaderOptions) -> Source:
    """One JSON object a line; empty lines are passed over."""
    root = Path(options.image_root or path.parent)
    rows = _rows_of_jsonl(path)
    return Source(_each(lambda where, row: plain_row(row, where, root, options), rows), len(rows))


def read_folder(folder: Path, options: ReaderOptions) -> Source:
    """Images, masks of the same name, and `prompts.csv` or `metadata.jsonl`; without these, one prompt for all.

    Images lie in the folder or in `images/`, masks (PNG) in `masks/` or beside the image; with `options.image_root`
    there in its place. A row may name its own mask; one that is null or empty says that the thing is not there.

    Raises:
        ValueError: there are neither prompts nor `options.prompt`, or no images.
    """
    owners: dict[str, str] = {}  # the image that each mask is of
    listed = next((folder / name for name in PROMPT_FILES if (folder / name).is_file()), None)
    root = Path(options.image_root or folder)
    if listed is None and not options.prompt:
        raise ValueError(
            f"{folder}: what is to be segmented? Write a prompts.csv with the columns image and prompt "
            "(and mask, if it is not called like its image), or give one prompt for all images by --prompt"
        )
    if listed is None:
        rows = _rows_of_images(root)
    elif listed.suffix == ".csv":
        rows = _rows_of_csv(listed)
    else:
        rows = _rows_of_jsonl(listed)

    def parse(where: str, row: Any) -> RawSample:
        if not isinstance(row, dict) or options.find(row, "image") is None:
            return plain_row(row, where, root, options)
        name, mask = options.find(row, "image") or "", options.find(row, "mask")
        image = find(where, name, lambda: _find(root, row[name], "images", IMAGE_SUFFIXES))
        if mask is not None:
            row = row | {mask: find(where, mask, lambda: _find_mask(root, row[mask]))}
        elif "conversations" not in row:
            found = _same_named_mask(root, image, where)
            other = owners.setdefault(found, str(image))
            if (root / other).resolve() != (root / str(image)).resolve():
                told = f"{found} would be the mask of {other} and of {image}: name it in the list, or call it"
                raise BadSample(where, "mask", f"{told} masks/{Path(str(image)).name}.png")
            row = row | {options.columns.get("mask", "mask"): found}
        return plain_row(row | {name: image}, where, root, options)

    def find(where: str, field: str, look: Callable[[], Any]) -> Any:
        try:
            return look()
        except ValueError as error:
            raise BadSample(where, field, error) from None

    return Source(_each(parse, rows), len(rows))


def _rows_of_images(folder: Path) -> list[tuple[str, Any]]:
    place = folder / "images" if (folder / "images").is_dir() else folder
    names = sorted(path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if place == folder:  # a PNG beside a photograph of the same name is its mask
        photos = {path.stem for path in names if path.suffix.lower() != ".png"}
        names = [path for path in names if path.suffix.lower() != ".png" or path.stem not in photos]
    if not names:
        raise ValueError(f"{place} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return [(str(path), {"image": str(path.relative_to(folder))}) for path in names]


def _read_text(path: Path) -> str:
    """Raises ValueError: the file is not UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line}: not UTF-8 text (byte {content[error.start]:#04x}); save the file as UTF-8 "
            '("CSV UTF-8" in Excel), or convert it: iconv -f cp1252 -t utf-8'
        ) from None


def _rows_of_csv(path: Path) -> list[tuple[str, Any]]:
    with io.StringIO(_read_text(path), newline="") as file:
        reader = csv.DictReader(file)
        rows: list[tuple[str, Any]] = []
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                wanted = len(reader.fieldnames or [])
                broken = BadSample(where, "", f"not {wanted} columns; put texts that hold commas in double quotes")
                rows.append((where, broken))
            else:
                rows.append((where, {name.strip(): value.strip() for name, value in row.items()}))
    return rows


def _rows_of_jsonl(path: Path) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        where = f"{path} line {number}"
        try:
            rows += [(where, json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            rows.append((where, BadSample(where, "", f"not JSON: {error}")))
    return rows


def _find(folder: Path, name: Any, place: str, suffixes: tuple[str, ...]) -> Any:
    """A name as it stands in the list, or with `images/` or `masks/` before it, or without its suffix."""
    if not isinstance(name, str) or not name or (folder / name).is_file():
        return name
    for where in (place, "."):
        for candidate in (name, *(name + suffix for suffix in suffixes)):
            if (folder / where / candidate).is_file():
                return f"{where}/{candidate}"
    raise ValueError(f"there is no file {name!r} in {folder} or {folder / place}")


def _find_mask(folder: Path, value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(part, (str, dict)) for part in value):
        return [_find_mask(folder, part) for part in value]
    return _find(folder, value.strip() if isinstance(value, str) else value, "masks", (".png",))


def _same_named_mask(folder: Path, image: Any, where: str) -> str:
    path = Path(str(image))
    inner = Path(*path.parts[1:]) if path.parts[:1] == ("images",) else path
    usual = Path("masks") / inner.with_suffix(".png")
    candidates = [Path("masks") / f"{inner}.png", usual]
    if path.suffix.lower() != ".png":
        candidates.append(path.with_suffix(".png"))
    for candidate in candidates:
        if (folder / candidate).is_file():
            return str(candidate)
    raise BadSample(where, "mask", f"no {usual} in {folder}; an empty field says that the thing is not there")


def read_json(path: Path, options: ReaderOptions) -> Source:
    """COCO instances, or a list of rows as in JSONL.

    Raises:
        ValueError: the file is neither.
    """
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}; is it JSONL? Then call it .jsonl") from None
    if isinstance(content, list):
        root = Path(options.image_root or path.parent)
        rows = [(f"{path} item {number}", row) for number, row in enumerate(content)]
        return Source(_each(lambda where, row: plain_row(row, where, root, options), rows), len(rows))
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(f"{path}: COCO needs 'images', 'annotations' and 'categories'; other JSON is a list of rows")
    return read_coco(content, path, options)


# ---------------------------------------------------------------------- data sets


def read_table(table: Dataset, name: str, options: ReaderOptions, folder: Path = Path()) -> Source:
    """A `datasets` table: `image` an Image, the bytes of a picture file or a path, `mask` one of these, a list of
    them, an array (H, W), RLE, polygons or null. Relative paths start from `folder`.

    Raises:
        ValueError: a column is missing.
    """
    columns = dict.fromkeys(table.column_names)
    wanted = {part: options.find(columns, part) for part in ALIASES}
    optional = {"prompt"} if options.prompt or "conversations" in columns else set()
    optional |= {"mask"} if "conversations" in columns else set()
    for part in ALIASES:
        if wanted[part] is None and part not in optional:
            raise ValueError(f"{name}: no column {part!r} among {table.column_names}; name it by --columns {part}=...")
    for part in ("image", "mask"):
        column = wanted[part]
        if column is not None and _holds_pictures(table.features[column]):
            table = table.cast_column(column, Image())
    image = wanted["image"] or ""
    is_image = isinstance(table.features[image], Image)
    root = Path(options.image_root or folder)

    def read(where: str, number: int) -> RawSample:
        try:
            row = table[number]
        except Exception as error:  # whatever a decoder raises
            raise BadSample(where, "", f"cannot be decoded: {error}") from None
        if wanted["mask"] is not None and isinstance(table.features[wanted["mask"]], Array2D):
            value = row[wanted["mask"]]
            row = row | {wanted["mask"]: None if value is None else np.asarray(value)}
        found = plain_row(row, where, root, options)
        found.row = number if is_image else -1
        return found

    samples = _each(read, ((f"{name} row {number}", number) for number in range(len(table))))
    images = None
    if is_image:
        images = table.select_columns([image])
        images = images if image == "image" else images.rename_column(image, "image")
    return Source(samples, len(table), images)


def _holds_pictures(feature: Any) -> bool:
    """Whether a column has the bytes of picture files, as such or beside their paths, but is no `Image` column yet."""
    if isinstance(feature, dict):
        return {"bytes", "path"} == feature.keys()
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
