"""What the project knows of the pictures: their nouns, categories and splits, from the files in `tables/`."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "tables"
VOCABULARY = FOLDER / "vocabulary.json"

# Nouns that only the split "unseen" shows.
UNSEEN = frozenset(
    "birch blackbird dolphinfish hammock lavender pomegranate poplar shorts swan tangerine telephone uranus "
    "walnut".split()
)


@dataclass(frozen=True)
class Noun:
    """A kind of thing: its key, how it is written, other names, and wider words, narrowest first."""

    key: str
    written: str
    synonyms: tuple[str, ...]
    categories: tuple[str, ...]


@dataclass(frozen=True)
class Backdrop:
    """A picture to stand things on: `floor` is the height of the floor's far edge, a fraction from the top."""

    file: str
    floor: float
    avoid: tuple[str, ...]
    split: str


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of `tables/<name>.tsv`, whose first line names the columns."""
    with (FOLDER / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


@cache
def nouns() -> dict[str, Noun]:
    """All nouns by key."""
    return {
        row["noun"]: Noun(
            row["noun"], row["written"] or row["noun"], _listed(row["synonyms"]), _listed(row["categories"])
        )
        for row in read_table("nouns")
    }


@cache
def emoji() -> dict[str, str]:
    """Code points ("1f34e") of the emoji that show one thing, and their nouns."""
    return {row["code"]: row["noun"] for row in read_table("emoji")}


@cache
def stamps() -> dict[str, tuple[str, bool]]:
    """Tux Paint stamps (path without its ending): noun, and whether it is a photograph."""
    return {row["stamp"]: (row["noun"], row["style"] == "photo") for row in read_table("tuxpaint")}


@cache
def furniture() -> dict[str, str]:
    """Identifiers of Sweet Home 3D's models ("Scopia#bed") and their nouns."""
    return {row["model"]: row["noun"] for row in read_table("furniture")}


def backdrops(source: str) -> list[Backdrop]:
    """The pictures of one package that serve as backgrounds."""
    return [
        Backdrop(row["file"], float(row["floor"]), _listed(row["avoid"]), row["split"])
        for row in read_table("backgrounds")
        if row["source"] == source
    ]


@cache
def splits() -> dict[str, str]:
    """The split of every identity in the tables.

    Of a noun with 3 or 4 identities one is for testing; with 5 or more about a sixth, and a twelfth for validation.
    Which ones, a hash of the identity says: nothing depends on what has been downloaded.
    """
    identities: dict[str, list[str]] = {}
    for source, table in (("fl", emoji()), ("sh3d", furniture()), ("tux", {k: v for k, (v, _) in stamps().items()})):
        for name, noun in table.items():
            identities.setdefault(noun, []).append(f"{source}:{name}")
    chosen = {}
    for noun, several in identities.items():
        several.sort(key=lambda one: hashlib.sha256(one.encode()).digest())
        count = len(several)
        test = 0 if count < 3 else max(1, round(count / 6))
        val = 0 if count < 5 else max(1, round(count / 12))
        for place, one in enumerate(several):
            split = "test" if place < test else "val" if place < test + val else "train"
            chosen[one] = "unseen" if noun in UNSEEN else split
    return chosen
