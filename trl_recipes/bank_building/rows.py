"""Rows of the bank's tables, and what the makers of them are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from . import tables
from .pictures import color_name, encode

Row = dict[str, Any]
DRAWN_SETS = {name: f"@iconify-json/{name}" for name in ("noto", "twemoji", "openmoji", "fluent-emoji-flat")}
UNREADABLE = (OSError, ValueError, KeyError, SyntaxError, Image.DecompressionBombError)


@dataclass
class Workplace:
    """What a source is given.

    Attributes:
        unpacked: by package name, the folder with its files.
        folder: where the source may keep what it has made so far.
        views: how many sides of a model are rendered.
        problems: "file: reason" of every file that could not be used; the source adds to it.
    """

    unpacked: dict[str, Path]
    folder: Path
    views: int = 8
    problems: list[str] = field(default_factory=list)


def sprite_row(
    picture: Image.Image,
    noun: str,
    identity: str,
    src: str,
    origin: tuple[str, str, str],
    photo: bool,
    split: str | None = None,
) -> Row:
    """A row of sprites.parquet for a picture that is cut out already.

    Args:
        picture: RGBA.
        noun: key in the table of nouns.
        identity: "source:name"; all views of one model share it.
        src: the source's short name.
        origin: file, author, licence.
        photo: True for a photograph.
        split: default: what the tables say of the identity.
    """
    known = tables.nouns()[noun]
    return {
        "image": {"bytes": encode(picture), "path": None},
        "noun": noun,
        "name": known.written,
        "synonyms": list(known.synonyms),
        "categories": list(known.categories),
        "color": color_name(picture),
        "photo": photo,
        "src": src,
        "id": identity,
        "split": split or tables.splits()[identity],
        **dict(zip(("file", "author", "lic"), origin, strict=True)),
    }


def backdrop_row(picture: Image.Image, one: tables.Backdrop, kind: str, src: str, rights: tuple[str, str]) -> Row:
    """A row of backgrounds.parquet; `rights` is author and licence."""
    return {
        "image": {"bytes": encode(picture, quality=85), "path": None},
        "floor": one.floor,
        "avoid": list(one.avoid),
        "split": one.split,
        "kind": kind,
        "src": src,
        "file": one.file,
        "author": rights[0],
        "lic": rights[1],
    }


def reason(error: Exception) -> str:
    """Why a file could not be used, for `Workplace.problems`."""
    return "it is not in the package" if isinstance(error, FileNotFoundError) else str(error)
