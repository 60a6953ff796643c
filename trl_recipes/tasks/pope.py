"""POPE: is there such a thing in the image? Yes or no."""

import json
from functools import partial
from pathlib import Path

from .parquet_rows import ParquetRows
from .samples import Sample, Samples, open_rgb
from .task import Source


def read(source: Source) -> Samples:
    """One sample for each question; the kind is the way in which absent things were chosen."""
    if source.format == "parquet":
        table = ParquetRows(source.files[0])
        table.require("image", "question", "answer", "category", "question_id")
        return Samples.of(
            Sample(
                id=f"{row['category']}-{int(row['question_id']):06d}",
                text=row["question"],
                load_image=partial(table.image, number),
                answer=row["answer"],
                kind=row["category"],
                group=str(row.get("image_source", number)),
            )
            for number, row in enumerate(table.rows)
            if source.split in ("all", row["category"])
        )
    return Samples.of(
        sample
        for (path,) in source.files
        if source.split in ("all", _category(path))
        for sample in _questions(source, path)
    )


def _category(path: Path) -> str:
    return path.stem.removeprefix("coco_pope_")


def _questions(source: Source, path: Path) -> list[Sample]:
    samples = []
    with path.open(encoding="utf-8") as file:  # splits lines at line ends alone; str.splitlines does in texts, too
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                samples.append(
                    Sample(
                        id=f"{_category(path)}-{int(row['question_id']):06d}",
                        text=row["text"],
                        load_image=partial(open_rgb, source.images / row["image"]),
                        answer=row["label"],
                        kind=_category(path),
                        group=row["image"],
                    )
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no question of POPE ({error!r})") from None
    return samples
