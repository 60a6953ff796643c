"""Runs the stages, joins what they made, checks it, and writes the bank."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..scenes.bank import SPLITS, SceneBank
from . import tables
from .packages import PackageError, fetch, unpack, version
from .rows import DRAWN_SETS, Workplace
from .sources import SOURCES, Source

RECIPE = "1"  # raise it when pictures come out differently: finished stages are then made anew
FINGERPRINT, PROBLEMS = b"bank_building", b"problems"
_ORIGIN = [(name, pa.string()) for name in ("src", "split", "file", "author", "lic")]
_IMAGE = ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
_WORDS = pa.list_(pa.string())
SCHEMAS = {
    "sprites": pa.schema(
        [_IMAGE, ("noun", pa.string()), ("name", pa.string()), ("synonyms", _WORDS), ("categories", _WORDS)]
        + [("color", pa.string()), ("photo", pa.bool_()), ("id", pa.string()), *_ORIGIN]
    ),
    "backgrounds": pa.schema([_IMAGE, ("floor", pa.float64()), ("avoid", _WORDS), ("kind", pa.string()), *_ORIGIN]),
}


def build_bank(
    output: Path, work: Path, skip: Iterable[str] = (), views: int = 8, sources: tuple[Source, ...] = SOURCES
) -> str:
    """Builds the bank in `output` and returns a report of what is in it.

    Args:
        output: folder for sprites.parquet, backgrounds.parquet, vocabulary.json and ATTRIBUTION.md.
        work: folder for archives and finished stages; what is there is used again.
        skip: names of sources to do without.
        views: sides from which a model is rendered.
        sources: what the bank is made of.

    Raises:
        ValueError: an unknown source in `skip`, a library that is not installed, a package that cannot be had, or a
            bank that lacks a split.
    """
    skip = set(skip)
    if unknown := skip - {source.name for source in sources}:
        names = ", ".join(source.name for source in sources)
        raise ValueError(f"There is no source {', '.join(sorted(unknown))}; --skip takes {names}.")
    chosen = [source for source in sources if source.name not in skip]
    for kind in SCHEMAS:
        if not any(source.kind == kind for source in chosen):
            raise ValueError(f"With every source of {kind} skipped there is no bank; skip fewer.")
    _need([source for source in chosen if not _stage_file(source, work).is_file()])
    archives = _fetch_all(chosen, work / "packages")
    stages = {source.name: _stage(source, archives, work, views) for source in chosen}
    output.mkdir(parents=True, exist_ok=True)
    for kind in SCHEMAS:
        pieces = [pq.read_table(stages[source.name]) for source in chosen if source.kind == kind]
        _write(pa.concat_tables([piece.replace_schema_metadata() for piece in pieces]), output / f"{kind}.parquet")
    (output / "vocabulary.json").write_text(tables.VOCABULARY.read_text(encoding="utf-8"), encoding="utf-8")
    (output / "ATTRIBUTION.md").write_text(_attribution(chosen, stages, archives), encoding="utf-8")
    _check(output)
    return _report(output, chosen, stages)


def _need(sources: list[Source]) -> None:
    if missing := [sentence for source in sources for sentence in source.lacks()]:
        raise ValueError("\n".join(missing))


def _stage_file(source: Source, work: Path) -> Path:
    return work / "stages" / f"{source.name}.parquet"


def _fetch_all(sources: list[Source], folder: Path) -> dict[str, Path]:
    # All failures are told at once: each may take a person's help.
    wanted = {package.name: (package, source.name) for source in sources for package in source.packages}
    archives, failures = {}, []
    with tqdm(wanted.values(), desc="packages", unit="package") as bar:
        for package, source in bar:
            bar.set_postfix_str(package.name)
            try:
                archives[package.name] = fetch(package, folder)
            except PackageError as error:
                failures.append(f"- {error} Or go on without it: --skip {source}.")
    if failures:
        raise ValueError("Not all packages could be had.\n" + "\n".join(failures))
    return archives


def _stage(source: Source, archives: dict[str, Path], work: Path, views: int) -> Path:
    # The source's rows as a parquet file, made if it is not there or was made from something else.
    path = _stage_file(source, work)
    mark = _fingerprint(source, archives, views)
    if path.is_file() and (pq.read_schema(path).metadata or {}).get(FINGERPRINT) == mark:
        return path
    _need([source])
    place = Workplace(
        unpacked={one.name: unpack(one, archives[one.name], work / "unpacked") for one in source.packages},
        folder=work / "rendered" / _slug(source.name, archives[source.packages[0].name].stem, f"{views}-views", RECIPE),
        views=views,
    )
    rows = list(source.rows(place))
    if not rows:
        listed = "; ".join(place.problems[:5])
        raise ValueError(f"The source {source.name} gave no picture ({listed}). Pass --skip {source.name} to go on.")
    schema = SCHEMAS[source.kind].with_metadata({FINGERPRINT: mark, PROBLEMS: json.dumps(place.problems).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def _slug(*words: str) -> str:
    return "-".join(words).replace("%", "_")


def _fingerprint(source: Source, archives: dict[str, Path], views: int) -> bytes:
    named = [archives[package.name].name for package in source.packages]
    text = json.dumps([RECIPE, source.name, named, views if source.name == "furniture" else 0])
    written = b"".join(path.read_bytes() for path in sorted(tables.FOLDER.glob("*.tsv")))
    return hashlib.sha256(text.encode() + written).hexdigest()[:16].encode()


def _write(table: pa.Table, path: Path) -> None:
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial, row_group_size=500)
    partial.replace(path)


def _check(output: Path) -> None:
    # What training relies on: all splits are there, and no identity or unseen noun is in two.
    for split in SPLITS:
        SceneBank.from_folder(output, split)
    rows = pq.read_table(output / "sprites.parquet", columns=["noun", "id", "split"]).to_pylist()
    where: dict[str, set[str]] = {}
    for row in rows:
        source, _, name = row["id"].partition(":")
        known = f"fl:{name}" if source in DRAWN_SETS else row["id"]  # one emoji, whoever draws it
        where.setdefault(known, set()).add(row["split"])
    shared = sorted(one for one, splits in where.items() if len(splits) > 1)
    unseen = {row["noun"] for row in rows if row["split"] == "unseen"}
    leaked = sorted(unseen & {row["noun"] for row in rows if row["split"] != "unseen"})
    if shared or leaked:
        raise ValueError(f"Identities in two splits: {shared[:5]}; unseen nouns in another split: {leaked[:5]}.")


def _problems(stage: Path) -> list[str]:
    return json.loads((pq.read_schema(stage).metadata or {}).get(PROBLEMS, b"[]"))


def _report(output: Path, sources: list[Source], stages: dict[str, Path]) -> str:
    columns = ["id", "noun", "split", "photo"]
    rows: list[dict[str, Any]] = pq.read_table(output / "sprites.parquet", columns=columns).to_pylist()
    backdrops = pq.read_table(output / "backgrounds.parquet", columns=["split"])["split"].to_pylist()
    lines = ["source       pictures  unusable"]
    for source in sources:
        bad = _problems(stages[source.name])
        lines.append(f"{source.name:12} {pq.read_metadata(stages[source.name]).num_rows:8}  {len(bad):8}")
        lines += [f"  {problem}" for problem in bad[:10]] + ([f"  and {len(bad) - 10} more"] if len(bad) > 10 else [])
    identities, kinds = len({row["id"] for row in rows}), len({row["noun"] for row in rows})
    photos = sum(row["photo"] for row in rows)
    lines += [
        f"{len(rows)} cut-outs ({photos} photographs) of {identities} identities, {kinds} nouns: "
        + _counted(row["split"] for row in rows),
        f"{len(backdrops)} backgrounds: {_counted(backdrops)}",
        f"written: {', '.join(sorted(path.name for path in output.iterdir() if path.is_file()))} in {output}",
    ]
    return "\n".join(lines)


def _counted(splits: Iterable[str]) -> str:
    counts = Counter(splits)
    return ", ".join(f"{split} {counts[split]}" for split in SPLITS if counts[split])


def _attribution(sources: list[Source], stages: dict[str, Path], archives: dict[str, Path]) -> str:
    """Who made every picture, as the packages say, in Markdown."""
    parts = [
        "# Attribution",
        "Pictures in this bank, with author and licence as their packages state them. The bank is for training on your "
        "own machine; ask these licences before you pass pictures on.",
    ]
    for source in sources:
        held = ", ".join(f"{one.name} {version(archives[one.name])} ({one.registry})" for one in source.packages)
        table = pq.read_table(stages[source.name], columns=["file", "author", "lic"])
        lines = dict.fromkeys((row["file"], row["author"], row["lic"]) for row in table.to_pylist())
        parts.append(f"## {source.name}: {held}")
        parts.append("\n".join(f"- `{file}`: {author}; {licence}" for file, author, licence in sorted(lines)))
    return "\n\n".join(parts) + "\n"
