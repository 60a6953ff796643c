"""This project's own tests: composed scenes, real photographs with hand-drawn masks, and the user's own masks."""

import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from processing.image_inputs import load_image

from ..scenes import SceneBank, SceneDataset, flat_expressions
from .samples import Sample, Samples, open_mask, open_rgb
from .task import MissingData, Source

PER_SCENE = 4  # most questions about one scene


def read_scenes(source: Source) -> Samples:
    """Expressions of composed scenes that depend on seed and preset alone; the split is that of the bank. Presets
    joined by "+" take turns, scene by scene."""
    options = source.options
    count = int(options["expressions"])
    bank = SceneBank.from_folder(source.root, source.split)
    scenes = SceneDataset(bank, seed=int(options["seed"]), length=count, schedule=[(0, options["preset"])])
    flat = flat_expressions(scenes, count)
    per_scene = flat.dataset.expressions_per_scene

    def make(place: int) -> Sample:
        item = flat[place]  # composed on the spot; its neighbours share the scene
        scene = place // per_scene
        return Sample(
            id=f"{scene:06d}-{place % per_scene:02d}",
            text=item["text"],
            load_image=lambda: item["image"],
            load_mask=lambda: item["mask"],
            kind=item["kind"],
            group=f"{scene:06d}",
        )

    return Samples([f"{place // per_scene:06d}-{place % per_scene:02d}" for place in range(count)], make)


def read_scene_questions(source: Source) -> Samples:
    """Questions about composed scenes that are answered in words; with equal options the scenes are those of
    `read_scenes`. All scenes are composed once to learn how many questions each has; images are not kept.

    Raises:
        ValueError: the scenes permit hardly any questions.
    """
    options = source.options
    wanted = int(options["questions"])
    bank = SceneBank.from_folder(source.root, source.split)
    seed, schedule = int(options["seed"]), [(0, options["preset"])]
    dataset = SceneDataset(bank, seed=seed, length=wanted, schedule=schedule, questions_per_scene=PER_SCENE)
    image_of = lru_cache(maxsize=2)(lambda number: dataset.scene(number)[0].image)
    samples: list[Sample] = []
    with tqdm(total=wanted, desc="composing questions", unit="question", leave=False) as bar:
        for number in range(len(dataset)):
            if len(samples) >= wanted:
                break
            found = _questions(dataset, number, partial(image_of, number))
            samples += found
            bar.update(len(found))
    if len(samples) < wanted:
        raise ValueError(f"{len(dataset)} scenes of {source.root} permit {len(samples)} questions, not {wanted}")
    return Samples.of(samples[:wanted])


def _questions(dataset: SceneDataset, number: int, load_image: Callable[[], Image.Image]) -> list[Sample]:
    scene, _ = dataset.scene(number)
    return [
        Sample(
            id=f"{number:06d}-{place:02d}",
            text=question.text,
            load_image=load_image,
            answer=question.answer,
            accepted=question.accepted,
            kind=question.kind,
            group=f"{number:06d}",
        )
        for place, question in enumerate(dataset.questions(number, scene))
    ]


def read_photographs(source: Source) -> Samples:
    """Every expression of every item in `real.json`.

    Raises:
        MissingData: a picture that the file names is not there.
        ValueError: the file is not as `tasks show real` tells.
    """
    samples = []
    for number, item in enumerate(_items(source.file())):
        for name in (item["image"], item["mask"]):
            if not (source.images / name).is_file():
                raise MissingData(f"{source.file()} names {name}, which is not in {source.images}")
        for place, text in enumerate(item["expressions"]):
            samples.append(
                Sample(
                    id=f"{number:04d}-{place:02d}",
                    text=text,
                    load_image=partial(open_rgb, source.images / item["image"]),
                    load_mask=partial(open_mask, source.images / item["mask"]),
                    kind=item.get("kind") or "",
                    group=item["image"],
                )
            )
    return Samples.of(samples)


def _items(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    items = content.get("items") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise ValueError(f"{path}: the key 'items' with a list is missing; `tasks show real` tells what is in it")
    for number, item in enumerate(items):
        for key, form, told in (("image", str, "a path"), ("mask", str, "a path"), ("expressions", list, "a list")):
            if not isinstance(item, dict) or not item.get(key) or not isinstance(item[key], form):
                raise ValueError(f"{path}, item {number}: the key {key!r} needs {told}; see `tasks show real`")
    return items


def read_masks(source: Source) -> Samples:
    """Every row of one's own masks, as training reads them, with its options.

    Raises:
        ValueError: there are several files to choose from, or only those of another split; an option that cannot be; a
            row is a conversation.
        BadSample: a row cannot be used (a `ValueError`).
    """
    from ..mask_data import load_mask_data, target_masks  # `datasets`, which no other task needs
    from ..mask_data.arguments import MaskDataArguments
    from ..mask_data.loading import SPLIT_NAMES
    from ..mask_data.mask_values import union_of

    data, split = (source.root, source.split) if source.format == "split" else (source.root, "train")
    if (source.root / "dataset_dict.json").is_file() and source.format != "split":
        found = json.loads((source.root / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise ValueError(f"{source.root} has the splits {', '.join(found)}, but no {source.split}: give the --split")
    if source.format == "file":
        data = source.file()
        kind = data.stem.partition("-")[0]  # of train-00000-of-00001, too
        if len(source.files[0]) > 1 or any(kind in names for names in SPLIT_NAMES.values()):
            names = ", ".join(path.name for path in source.files[0])
            raise ValueError(
                f"{source.root} holds {names}, but no {source.split}{data.suffix}: give the --split, or call it so"
            )
    given = dict(source.options, columns=str(source.options["columns"] or "").split())
    if source.images != source.root:
        given["image_root"] = str(source.images)
    rows = load_mask_data(data, split, MaskDataArguments(data=str(data), **given).reader_options())
    samples = []
    for number, row in enumerate(rows.remove_columns("image")):
        if row["conversation"]:
            raise ValueError(f"{row['sample']} is a conversation, whose wording is its own; give rows with a prompt")
        samples.append(
            Sample(
                id=f"{number:06d}",
                text=row["prompt"],
                load_image=lambda number=number: load_image(rows[number]["image"]),  # type: ignore[misc]
                load_mask=partial(union_of, target_masks(row), row["image_size"]),
                group=row["image_id"],
            )
        )
    return Samples.of(samples)
