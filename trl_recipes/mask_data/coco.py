"""COCO instances as requests: a category in an image, or an annotation's own caption."""

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .mask_values import split_masks
from .readers import ReaderOptions
from .samples import BadSample, RawSample, Source

FIELDS = {"image": "file_name", "prompt": "category_id", "mask": "segmentation"}


def read_coco(content: dict[str, Any], path: Path, options: ReaderOptions) -> Source:
    """Samples of a COCO instances file: with categories one for each category in an image (the union of its
    instances), with captions one for each annotation and caption.

    Raises:
        ValueError: the file has no categories (or no captions) to make prompts of.
    """
    annotations = [(number, one) for number, one in enumerate(content["annotations"])]
    captioned = any(isinstance(one, dict) and "caption" in one for _, one in annotations)
    by_caption = captioned if options.coco_prompts == "auto" else options.coco_prompts == "captions"
    if by_caption and not captioned:
        raise ValueError(f"{path}: no annotation has a 'caption'; use --coco_prompts categories")
    if not by_caption and not content.get("categories"):
        raise ValueError(f"{path}: no 'categories' to make prompts of")
    samples = list(_captions(content, path, options) if by_caption else _categories(content, path, options))
    return Source(samples, len(samples))


def _files(content: dict[str, Any]) -> dict[Any, str]:
    return {image.get("id"): image.get("file_name") or "" for image in content["images"] if isinstance(image, dict)}


def _root(path: Path, options: ReaderOptions, files: dict[Any, str]) -> Path:
    """The folder of the images: as given, or beside the file in one of the usual places."""
    if options.image_root:
        return Path(options.image_root)
    first = next((name for name in files.values() if name), "")
    for place in (path.parent, path.parent / "images", path.parent / path.stem, path.parent.parent / "images"):
        if (place / first).is_file():
            return place
    return path.parent


def _checked(content: dict[str, Any], path: Path, wanted: str) -> Iterator[tuple[str, dict[str, Any]] | BadSample]:
    """Annotations with a known image, a segmentation and the field `wanted`; errors in place of the others."""
    files = _files(content)
    known = {category.get("id") for category in content.get("categories", [])}
    for number, one in enumerate(content["annotations"]):
        where = f"{path} annotations[{number}]"
        if not isinstance(one, dict):
            yield BadSample(where, "", "not an object")
        elif not files.get(one.get("image_id")):
            yield BadSample(where, "image_id", f"no image with the id {one.get('image_id')!r} and a file_name")
        elif not split_masks(one.get("segmentation")):
            yield BadSample(where, "segmentation", "missing or empty; an annotation needs RLE or polygons")
        elif wanted == "category_id" and one.get(wanted) not in known:
            yield BadSample(where, wanted, f"no category with the id {one.get(wanted)!r}")
        elif wanted == "caption" and not _texts(one.get(wanted)):
            yield BadSample(where, wanted, "no caption (a text, or a list of texts)")
        else:
            yield where, one


def _texts(caption: Any) -> list[str]:
    texts = caption if isinstance(caption, list) else [caption]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _captions(content: dict[str, Any], path: Path, options: ReaderOptions) -> Iterator[RawSample | BadSample]:
    files = _files(content)
    root = _root(path, options, files)
    for found in _checked(content, path, "caption"):
        if isinstance(found, BadSample):
            yield found
            continue
        where, one = found
        for text in _texts(one["caption"]):
            fields = FIELDS | {"prompt": "caption"}
            yield RawSample(where, files[one["image_id"]], text, [one["segmentation"]], None, fields, root)


def _categories(content: dict[str, Any], path: Path, options: ReaderOptions) -> Iterator[RawSample | BadSample]:
    files = _files(content)
    root = _root(path, options, files)
    names = {category.get("id"): category.get("name") for category in content["categories"]}
    masks: dict[Any, dict[Any, list[Any]]] = defaultdict(lambda: defaultdict(list))
    first: dict[tuple[Any, Any], str] = {}
    for found in _checked(content, path, "category_id"):
        if isinstance(found, BadSample):
            yield found
            continue
        where, one = found
        masks[one["image_id"]][one["category_id"]].append(one["segmentation"])
        first.setdefault((one["image_id"], one["category_id"]), where)
    for image in files:
        for category, several in masks[image].items():
            where = first[image, category]
            yield RawSample(where, files[image], str(names[category]), several, None, FIELDS, root)
        others = [category for category in names if category not in masks[image]]
        chosen = random.Random(f"{path.name} {image}").sample(others, min(options.absent_per_image, len(others)))
        for category in chosen:
            where = f"{path} image {image}, without {names[category]}"
            yield RawSample(where, files[image], str(names[category]), [], None, FIELDS, root)
