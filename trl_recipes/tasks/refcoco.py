"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO: `refer` files, PSALM's JSON and the Hub's parquet mirrors.

All three forms become *references*: an object (gRefCOCO: any number of them, also none) of an image, with the sentences
people wrote for it. Under the protocol `per-expression` every sentence is a sample; under `merged`, as PSALM's JSON has
it and ARGenSeg was released, all sentences of a reference are one request.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from pycocotools import mask as coco_mask

from .parquet_rows import ParquetRows
from .safe_pickle import load_plain_pickle
from .samples import Sample, Samples, open_rgb, segmentation_rle
from .task import Source

SMALL, MEDIUM = 32**2, 96**2  # COCO's limits of area, in pixels


@dataclass(frozen=True)
class Reference:
    """What people refer to in an image, and with which sentences.

    Attributes:
        id: of the reference, zero-padded.
        image_id: of the image in COCO.
        sentences: as cleaned by the data set's authors (`sent`).
        load_rle: the union of the objects.
        area: of the union in pixels, None where not known without drawing it.
        targets: number of objects; 0: nothing of the kind is in the image.
    """

    id: str
    image_id: str
    sentences: tuple[str, ...]
    load_image: Callable[[], Image.Image]
    load_rle: Callable[[], dict[str, Any]]
    box: tuple[float, float, float, float] | None
    area: float | None
    targets: int


def read_references(source: Source) -> Iterator[Reference]:
    """The references of a split, whatever form they are in."""
    if source.format == "parquet":
        yield from _from_parquet(source)
    elif source.format == "psalm":
        for number, item in enumerate(_json(source.file())):
            yield _reference(source, number, item["image_info"], item["instruction"], item["anns"])
    else:
        yield from _from_refer(source)


def read(source: Source) -> Samples:
    """Samples under the protocol of `source`."""
    samples = []
    for reference in read_references(source):
        if source.protocol == "merged":
            # the released code puts a space before every sentence and a full stop behind it
            joined = "".join(f" {sentence}." for sentence in reference.sentences)
            samples.append(_sample(source, reference, reference.id, joined))
        else:
            for place, sentence in enumerate(reference.sentences):
                samples.append(_sample(source, reference, f"{reference.id}-{place:02d}", sentence))
    return Samples.of(samples)


def _sample(source: Source, reference: Reference, name: str, text: str) -> Sample:
    by_targets = source.options["kinds"] == "targets"
    return Sample(
        id=name,
        text=text,
        load_image=reference.load_image,
        load_mask=reference.load_rle,
        box=reference.box,
        kind=_targets_kind(reference.targets) if by_targets else _size_kind(reference),
        group=reference.image_id,
    )


def _targets_kind(targets: int) -> str:
    return ("no-target", "single")[targets] if targets < 2 else "multi"


def _size_kind(reference: Reference) -> str:
    area = reference.area if reference.area is not None else float(coco_mask.area(reference.load_rle()))
    return "small" if area < SMALL else "medium" if area < MEDIUM else "large"


def _from_refer(source: Source) -> Iterator[Reference]:
    """`refs(...).p` or `grefs(...).json` beside `instances.json`."""
    refs_path, instances_path = source.file(0), source.file(1)
    refs = load_plain_pickle(refs_path) if refs_path.suffix == ".p" else _json(refs_path)
    instances = _json(instances_path)
    images = {image["id"]: image for image in instances["images"]}
    annotations = {one["id"]: one for one in instances["annotations"]}
    for ref in refs:
        if ref["split"] != source.split:
            continue
        wanted = ref["ann_id"] if isinstance(ref["ann_id"], (list, tuple)) else [ref["ann_id"]]
        wanted = [one for one in wanted if one != -1]  # gRefCOCO: [-1] where there is no target
        try:
            image, found = images[ref["image_id"]], [annotations[one] for one in wanted]
        except KeyError as error:
            raise ValueError(
                f"{refs_path}: the reference {ref['ref_id']} names {error}, which {instances_path} does not hold; "
                "the two files belong to different data sets"
            ) from None
        yield _reference(source, ref["ref_id"], image, ref["sentences"], found)


def _reference(
    source: Source, number: int, image: dict[str, Any], sentences: Sequence[Any], annotations: Sequence[dict[str, Any]]
) -> Reference:
    segmentations = [one["segmentation"] for one in annotations]
    single = annotations[0] if len(annotations) == 1 else None
    return Reference(
        id=f"{number:08d}",
        image_id=str(image["id"]),
        sentences=tuple(_text(one) for one in sentences),
        load_image=partial(open_rgb, source.images / image["file_name"]),
        load_rle=partial(segmentation_rle, segmentations, image["height"], image["width"]),
        box=_corners(single["bbox"]) if single and "bbox" in single else None,
        area=single.get("area") if single else None,
        targets=len(annotations),
    )


def _from_parquet(source: Source) -> Iterator[Reference]:
    """`jxu124/refcoco*` (annotations as JSON, images beside) and `lmms-lab/RefCOCO*` (images inside, one polygon)."""
    table = ParquetRows(source.files[0])
    if "raw_anns" not in table.columns:
        table.require("image", "answer", "segmentation", "bbox", "file_name")
    for number, row in enumerate(table.rows):
        if "raw_anns" in row:
            annotation, image = json.loads(row["raw_anns"]), json.loads(row["raw_image_info"])
            image = {"id": row["image_id"], **image}
            yield _reference(source, int(row["ref_id"]), image, row["sentences"], [annotation])
            continue
        yield Reference(
            id=f"{number:08d}",
            image_id=str(coco_image_id(row["file_name"])),
            sentences=tuple(row["answer"]),
            load_image=partial(table.image, number),
            load_rle=partial(_stored_mask, table, number, row["segmentation"]),
            box=_corners(row["bbox"]),
            area=None,
            targets=1,
        )


def _stored_mask(table: ParquetRows, row: int, polygon: list[float]) -> dict[str, Any]:
    with Image.open(BytesIO(table.image_bytes(row))) as image:  # reads the header alone
        width, height = image.size
    return segmentation_rle([[polygon]], height, width)


def coco_image_id(file_name: str) -> int:
    """The id in a file name of COCO: `COCO_train2014_000000581857_16.jpg`, `COCO_...581857.jpg` or `000000581857.jpg`.

    Raises:
        ValueError: the name holds no id of twelve digits.
    """
    for part in Path(file_name).stem.split("_"):
        if len(part) == 12 and part.isdigit():
            return int(part)
    raise ValueError(f"{file_name!r} is no file name of COCO: no id of twelve digits")


def _text(sentence: Any) -> str:
    return sentence if isinstance(sentence, str) else sentence["sent"]


def _corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    """COCO's (x, y, width, height) to (x0, y0, x1, y1)."""
    x, y, width, height = box
    return (x, y, x + width, y + height)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
