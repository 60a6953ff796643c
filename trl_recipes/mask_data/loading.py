"""Everybody's masks as one `datasets.Dataset`; see `load_mask_data`."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Image, concatenate_datasets, get_dataset_split_names, load_dataset
from datasets import Features as DatasetFeatures
from datasets import load_from_disk as load_table
from PIL import Image as PILImage
from tqdm.auto import tqdm

from processing.image_inputs import load_image

from ..metrics import to_rle
from .mask_values import read_mask
from .readers import PROMPT_FILES, read_folder, read_json, read_jsonl, read_table
from .samples import COLUMNS, BadSample, RawSample, ReaderOptions, Source

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}
SHOWN = 5  # bad samples that are named; the others are counted


def load_mask_data(
    data: str | Path,
    split: str = "train",
    options: ReaderOptions | None = None,
    skip_bad_samples: bool = False,
    progress: bool = True,
) -> Dataset:
    """Reads masks in any of the formats that people keep them in.

    Args:
        data: one of
            - a folder with images, PNG masks of the same names (in `masks/` or beside them) and `prompts.csv` or
              `metadata.jsonl` (`image` or `file_name`, `prompt`, and perhaps `mask`),
            - JSONL with `image`, `prompt` and `mask` (path of a PNG, COCO RLE, polygons; null or [] where the thing is
              not there), or the released project's, with `conversations` and `mask`,
            - COCO instances JSON, or a JSON list of rows as in JSONL,
            - a `datasets` data set, on disk (`save_to_disk`, parquet) or by its name on the Hub.
            A folder may also hold `train`, `validation` and `test` of any of these (folders or files); what it lists
            itself is "train", too.
        split: train, validation or test, where the data have splits; data without splits are all "train".
        options: what the data leave open; see `ReaderOptions`.
        skip_bad_samples: leave out samples that cannot be used, and say how many; default: the first one is an error.
        progress: show a progress bar.

    Returns:
        one row for each request, in the order of the data:
            `sample` where it stands ("train.jsonl line 3"),
            `image` (a `datasets.Image`; decodes to `PIL.Image`), `image_id` (the same for the same image) and
            `image_size` [height, width] of the upright image,
            `prompt` what to segment,
            `masks` COCO RLE: [] what is asked for is not there, [one] for a prompt, or one for each `<mask>` of a
            conversation,
            `conversation` turns of `role` and `content`, where the data bring their own wording; else null.

    Raises:
        BadSample: a sample cannot be used (a `ValueError`); names file, line and field.
        ValueError: there is no such data, no such split, or no sample in it.
    """
    options = options or ReaderOptions()
    source = open_source(data, split, options)
    good, bad, images = [], [], []
    bar = tqdm(source.samples, total=source.total, desc=f"reading {Path(data).name} ({split})", disable=not progress)
    for raw in bar:
        try:
            if isinstance(raw, BadSample):
                raise raw
            good.append(check_sample(raw))
            images.append(raw.row if source.images is not None else str(raw.root / raw.image))
        except BadSample as error:
            if not skip_bad_samples:
                raise
            bad.append(error)
    report_skipped(bad, len(good))
    if not good:
        raise ValueError(f"{data}: no usable sample in the split {split!r}")
    columns = Dataset.from_list(good, features=COLUMNS)
    return concatenate_datasets([columns, _image_column(images, source.images)], axis=1)


def _image_column(images: list[Any], table: Dataset | None) -> Dataset:
    if table is not None:
        return table.select(images).cast_column("image", Image())
    return Dataset.from_dict({"image": images}, features=DatasetFeatures({"image": Image()}))


def report_skipped(bad: list[BadSample], used: int) -> None:
    """Prints how many samples were left out, and why for the first few."""
    if not bad:
        return
    print(f"skipped {len(bad)} bad samples, {used} are used:")
    for error in bad[:SHOWN]:
        print(f"  {error}")
    if len(bad) > SHOWN:
        print(f"  ... and {len(bad) - SHOWN} more")


def check_sample(raw: RawSample) -> dict[str, Any]:
    """Opens image and masks of a sample.

    Raises:
        BadSample: one of them is missing, broken or of the wrong size.
    """
    image = raw.image
    try:
        if isinstance(image, str):
            path = raw.root / image
            if not path.is_file():
                raise ValueError(f"there is no file {str(path)!r}")
            image = path
        upright = load_image(image)
    except (ValueError, TypeError) as error:
        raise BadSample(raw.where, raw.name("image"), error) from None
    size = (upright.height, upright.width)
    try:
        if raw.told_size not in (None, size) and any(isinstance(value, list) for value in raw.masks):
            raise ValueError(_other_size(raw, size))
        masks = [read_mask(value, size, raw.root) for value in raw.masks]
    except ValueError as error:
        raise BadSample(raw.where, raw.name("mask"), error) from None
    if raw.conversation is None:  # several masks for one prompt are one answer
        masks = [union] if masks and (union := np.logical_or.reduce(masks)).any() else []
    elif not all(mask.any() for mask in masks):
        raise BadSample(raw.where, raw.name("mask"), "a mask is empty, but the conversation shows it")
    return {
        "sample": raw.where,
        "image_id": str(image) if isinstance(image, Path) else image_hash(upright),
        "image_size": list(size),
        "prompt": raw.prompt,
        "masks": [to_rle(mask) for mask in masks],
        "conversation": raw.conversation,
    }


def _other_size(raw: RawSample, size: tuple[int, int]) -> str:
    height, width = raw.told_size or size
    if (width, height) == size:
        mend = (
            "if the image was annotated as it is stored, before its EXIF orientation turns it upright, turn the "
            "polygons, too; if width and height are swapped, mend them"
        )
    else:
        mend = "if the image was resized after it was annotated, give it at its old size, or scale the polygons"
    return (
        f"{raw.told_by} says {width}x{height} (width x height), the upright image {str(raw.image)!r} is "
        f"{size[1]}x{size[0]}: its polygons would be drawn in the wrong place; {mend}"
    )


def image_hash(image: PILImage.Image) -> str:
    """The same for the same pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------------- which format, which split


def has_split(data: str | Path, split: str) -> bool:
    """Whether the data have this split of their own."""
    try:
        return find_split(data, split) is not None
    except ValueError:
        return False


def find_split(data: str | Path, split: str) -> Path | DatasetDict | str | None:
    """The part of the data that is a split: a path, a saved `DatasetDict`, or the Hub's name of the split.

    None: the data have splits, but not this one; or they have none, and it is not "train".

    Raises:
        ValueError: there is no such data.
    """
    names, path = SPLIT_NAMES.get(split, (split,)), Path(data)
    if not path.exists():
        return _hub_split(str(data), names)
    if (path / "dataset_dict.json").is_file():
        return next((path / name for name in names if (path / name).is_dir()), None)
    for name in names if path.is_dir() else ():
        found = _part(path, name)
        if found is not None:
            return found
    parts = (_part(path, name) for names in SPLIT_NAMES.values() for name in names)
    is_whole = all(part is None for part in parts) or _lists_samples(path)
    return path if split == "train" and is_whole else None


def _part(path: Path, name: str) -> Path | None:
    """What a folder has under the name of a split: a folder that lists samples, or a file, or another folder."""
    folder = path / name
    if _lists_samples(folder) or any(folder.glob("*.parquet")):
        return folder
    candidates = (*(path / f"{name}{suffix}" for suffix in (".jsonl", ".json", ".parquet")), folder)
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _lists_samples(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*PROMPT_FILES, "dataset_info.json", "dataset_dict.json"))


def _hub_split(name: str, names: tuple[str, ...]) -> str | None:
    if name.count("/") > 1 or name.startswith((".", "/")) or Path(name).suffix in (".jsonl", ".json", ".csv"):
        raise ValueError(f"there is no file or folder {name!r}")
    try:
        found = get_dataset_split_names(name)
    except Exception as error:  # of the Hub client, of the network, of a script that is not supported
        raise ValueError(f"{name!r} is no file or folder, and not to be had as a data set: {error}") from error
    return next((split for split in names if split in found), None)


def open_source(data: str | Path, split: str, options: ReaderOptions) -> Source:
    """The reader that the data call for.

    Raises:
        ValueError: no such data or split, or a format that is none of those above.
    """
    found = find_split(data, split)
    if found is None:
        raise ValueError(f"{data} has no split {split!r}")
    if isinstance(found, str):
        return read_table(load_dataset(str(data), split=found), f"{data} ({found})", options)
    assert isinstance(found, Path)
    if found.is_dir():
        return _open_folder(found, options)
    readers = {".jsonl": read_jsonl, ".json": read_json}
    if found.suffix in readers:
        return readers[found.suffix](found, options)
    if found.suffix == ".parquet":
        table = load_dataset("parquet", data_files=str(found), split="train")
        return read_table(table, str(found), options, found.parent)
    raise ValueError(f"{found}: not a folder, .jsonl, .json or .parquet")


def _open_folder(folder: Path, options: ReaderOptions) -> Source:
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        table = load_table(str(folder))
        assert isinstance(table, Dataset)
        return read_table(table, str(folder), options, folder)
    listed = any((folder / name).is_file() for name in PROMPT_FILES)
    parquet = sorted(folder.glob("*.parquet"))
    if parquet and not listed:
        table = load_dataset("parquet", data_files=[str(path) for path in parquet], split="train")
        return read_table(table, str(folder), options, folder)
    jsonl = sorted([*folder.glob("*.jsonl"), *folder.glob("*.json")])
    if jsonl and not listed:
        raise ValueError(f"{folder}: name the file, for example {jsonl[0]}")
    return read_folder(folder, options)


def split_by_image(dataset: Dataset, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and validation rows; all requests for one image are on the same side.

    Raises:
        ValueError: there are fewer than two images, or a share that sets none or all aside.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"--validation_share {share}: give a share between 0 and 1; to use all for training, give --eval_strategy "
            "no --load_best_model_at_end False"
        )
    ids = list(dict.fromkeys(dataset["image_id"]))
    if len(ids) < 2:
        raise ValueError(
            f"{len(ids)} image is too few to set some aside for validation: give --eval_data, or "
            "--eval_strategy no --load_best_model_at_end False to train without"
        )
    count = min(max(1, round(len(ids) * share)), len(ids) - 1)
    order = np.random.default_rng(seed).permutation(len(ids))
    held_out = {ids[i] for i in order[:count]}
    rows = [[i for i, name in enumerate(dataset["image_id"]) if (name in held_out) is side] for side in (False, True)]
    return dataset.select(rows[0]), dataset.select(rows[1])
