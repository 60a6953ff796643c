"""COCO instances as requests: a category in an image, or an annotation's own caption."""

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .mask_values import split_masks
from .samples import BadSample, RawSample, ReaderOptions, Source

FIELDS = {"image": "file_name", "prompt": "category_id", "mask": "segmentation"}


def read_coco(content: dict[str, Any], path: Path, options: ReaderOptions) -> Source:
    """Samples of a COCO instances file: with categories one for each category in an image (the union of its
    instances), with captions one for each annotation and caption.

    Raises:
        ValueError: the file has no categories (or no captions) to make prompts of, or two entries of the same id.
    """
    for part in ("images", "annotations"):
        if not isinstance(content[part], list):
            raise ValueError(f"{path}: {part!r} must be a list, not {type(content[part]).__name__}")
    annotations = [(number, one) for number, one in enumerate(content["annotations"])]
    captioned = any(isinstance(one, dict) and "caption" in one for _, one in annotations)
    by_caption = captioned if options.coco_prompts == "auto" else options.coco_prompts == "captions"
    if by_caption and not captioned:
        raise ValueError(f"{path}: no annotation has a 'caption'; use --coco_prompts categories")
    if not by_caption and not content.get("categories"):
        raise ValueError(f"{path}: no 'categories' to make prompts of")
    samples = list(_captions(content, path, options) if by_caption else _categories(content, path, options))
    return Source(samples, len(samples))


def _by_id(content: dict[str, Any], path: Path, part: str, name: str) -> dict[Any, dict[str, Any]]:
    """The entries of `images` or `categories` by their id. Raises ValueError: two of them have the same one."""
    found: dict[Any, dict[str, Any]] = {}
    numbers: dict[Any, int] = {}
    for number, entry in enumerate(content.get(part) or []):
        if not isinstance(entry, dict) or entry.get("id") is None:
            continue
        key = entry["id"]
        if key in found and entry != found[key]:
            raise ValueError(
                f"{path}: {part}[{numbers[key]}] ({found[key].get(name)!r}) and {part}[{number}] ({entry.get(name)!r}) "
                f"have the same id {key!r}: number one of them anew, in the annotations, too (or give the files that "
                "were put together one by one)"
            )
        numbers.setdefault(key, number)
        found[key] = entry
    return found


def _images(content: dict[str, Any], path: Path) -> dict[Any, dict[str, Any]]:
    return _by_id(content, path, "images", "file_name")


def _told_size(image: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) of an image as the file tells them, None where it does not."""
    height, width = image.get("height"), image.get("width")
    if not isinstance(height, (int, float)) or not isinstance(width, (int, float)) or min(height, width) <= 0:
        return None
    return int(height), int(width)


def _names(content: dict[str, Any], path: Path) -> dict[Any, str]:
    """The categories' names by their ids. Raises ValueError: one has no name, or two have the same id."""
    names = {}
    for key, category in _by_id(content, path, "categories", "name").items():
        name = category.get("name")
        if name is None or not str(name).strip():
            raise ValueError(f"{path}: the category with the id {key!r} has no 'name' to ask for: give it one")
        names[key] = str(name).strip()
    return names


def _thing(name: str) -> str:
    """What a category's name means: the same for names that differ in case, blanks or underscores alone."""
    return " ".join(re.split(r"[\s_-]+", name.casefold())).strip()


def _root(path: Path, options: ReaderOptions, images: dict[Any, dict[str, Any]]) -> Path:
    """The folder of the images: as given, or beside the file in one of the usual places."""
    if options.image_root:
        return Path(options.image_root)
    first = next((image["file_name"] for image in images.values() if image.get("file_name")), "")
    for place in (path.parent, path.parent / "images", path.parent / path.stem, path.parent.parent / "images"):
        if (place / first).is_file():
            return place
    return path.parent


def _checked(content: dict[str, Any], path: Path, wanted: str) -> Iterator[tuple[str, dict[str, Any]] | BadSample]:
    """Annotations with a known image, a segmentation and the field `wanted`; errors in place of the others."""
    images = _images(content, path)
    known = {category.get("id") for category in content.get("categories", [])}
    for number, one in enumerate(content["annotations"]):
        where = f"{path} annotations[{number}]"
        if not isinstance(one, dict):
            yield BadSample(where, "", "not an object")
        elif not images.get(one.get("image_id"), {}).get("file_name"):
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


def _sample(
    where: str, key: Any, image: dict[str, Any], prompt: str, masks: list[Any], prompt_field: str, root: Path
) -> RawSample:
    fields, told = FIELDS | {"prompt": prompt_field}, f"the entry of the image with the id {key!r}"
    return RawSample(
        where, image["file_name"], prompt, masks, None, fields, root, told_size=_told_size(image), told_by=told
    )


def _captions(content: dict[str, Any], path: Path, options: ReaderOptions) -> Iterator[RawSample | BadSample]:
    images = _images(content, path)
    root = _root(path, options, images)
    for found in _checked(content, path, "caption"):
        if isinstance(found, BadSample):
            yield found
            continue
        where, one = found
        key = one["image_id"]
        for text in _texts(one["caption"]):
            yield _sample(where, key, images[key], text, [one["segmentation"]], "caption", root)


def _categories(content: dict[str, Any], path: Path, options: ReaderOptions) -> Iterator[RawSample | BadSample]:
    images, names = _images(content, path), _names(content, path)
    root = _root(path, options, images)
    masks: dict[Any, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    first: dict[tuple[Any, str], tuple[str, str]] = {}  # where, and the name
    for found in _checked(content, path, "category_id"):
        if isinstance(found, BadSample):
            yield found
            continue
        where, one = found
        name = names[one["category_id"]]
        masks[one["image_id"]][_thing(name)].append(one["segmentation"])
        first.setdefault((one["image_id"], _thing(name)), (where, name))
    shown = _shown(content, images, names)
    things: dict[str, str] = {}
    for name in names.values():
        things.setdefault(_thing(name), name)
    for key, image in images.items():
        for thing, several in masks[key].items():
            where, name = first[key, thing]
            yield _sample(where, key, image, name, several, "category_id", root)
        there = shown[image.get("file_name")]
        others = [] if None in there else [name for thing, name in things.items() if thing not in there]
        chosen = random.Random(f"{path.name} {key}").sample(others, min(options.absent_per_image, len(others)))
        for name in chosen:
            yield _sample(f"{path} image {key}, without {name}", key, image, name, [], "category_id", root)


def _shown(
    content: dict[str, Any], images: dict[Any, dict[str, Any]], names: dict[Any, str]
) -> dict[Any, set[str | None]]:
    """What any annotation, usable or not, says to be in each image file; None for a category that is not known."""
    shown: dict[Any, set[str | None]] = defaultdict(set)
    for one in content["annotations"]:
        if isinstance(one, dict) and one.get("image_id") in images:
            name = names.get(one.get("category_id"))
            shown[images[one["image_id"]].get("file_name")].add(None if name is None else _thing(name))
    return shown
