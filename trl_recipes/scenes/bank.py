"""The bank of cut-out sprites and backgrounds that scenes are composed from.

A bank is a folder with three files:

- `sprites.parquet`: one row per cut-out; `image` (encoded picture with alpha), `noun`, `synonyms`, `categories`,
  `color`, `photo`, `src`, `id`, `split`, and optionally `name` (the noun as it is written, "ice cream");
- `backgrounds.parquet`: `image`, `floor` (height of the floor's far edge, fraction from the top), `avoid` (things
  that the picture already shows), `split`, and optionally `kind` ("photo" for photographs);
- `vocabulary.json`: `reasoning` phrases with the nouns or categories they mean, `irregular_plurals`, `as_one`
  (category -> its countable form) and `parents` (category -> wider categories).
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

SPLITS = ("train", "val", "test", "unseen")
SPRITE_COLUMNS = ("image", "noun", "synonyms", "categories", "color", "photo", "src", "id", "split")
BACKGROUND_COLUMNS = ("image", "floor", "avoid", "split")
VOCABULARY_KEYS = ("reasoning", "irregular_plurals", "as_one", "parents")
RENDER_SOURCES = ("sh3d",)
ALPHA_CUT = 128


@dataclass(frozen=True)
class Sprite:
    """One cut-out; its pixels come from `SceneBank.sprite_pixels(sprite.index)`.

    Attributes:
        index: position in `SceneBank.sprites`.
        noun: key of the noun ("icecream"); sprites of one kind share it.
        name: the noun as written in a sentence ("ice cream").
        synonyms: other written names.
        categories: wider words ("fruit", "food"), narrowest first.
        color: the dominant colour's name, or None where no colour dominates.
        photo: True for a photographic cut-out.
        src: the source's short name.
        id: identity; several views of one model share it.
        style: "photo", "render" or "stylised".
        target: False for sprites that serve as distractors only (test sprites in the split `unseen`).
    """

    index: int
    noun: str
    name: str
    synonyms: tuple[str, ...]
    categories: tuple[str, ...]
    color: str | None
    photo: bool
    src: str
    id: str
    style: str
    target: bool = True


@dataclass(frozen=True)
class Background:
    """One backdrop.

    Attributes:
        index: position in `SceneBank.backgrounds`.
        floor: height of the floor's far edge, fraction from the top.
        avoid: words for the things that it shows.
        plain: False for photographs, which may show more things than `avoid` lists.
    """

    index: int
    floor: float
    avoid: tuple[str, ...]
    plain: bool = True


@dataclass
class SceneBank:
    """Sprites, backgrounds and vocabulary of one split; build it with `SceneBank.from_folder`.

    Decoded pictures are cached in memory as they are used (about 70 kB per sprite of 160 px); a pickled bank leaves
    its cache behind, so `DataLoader` workers start small. `preload()` before forking lets workers share one cache.
    """

    split: str
    sprites: list[Sprite]
    backgrounds: list[Background]
    vocabulary: dict[str, Any]
    sprite_bytes: list[bytes]
    background_bytes: list[bytes]
    max_cached: int = 6000
    _pixels: OrderedDict[int, np.ndarray] = field(default_factory=OrderedDict, repr=False)
    _backdrops: dict[int, Image.Image] = field(default_factory=dict, repr=False)
    _groups: dict[str, dict[str, dict[str, list[int]]]] | None = field(default=None, repr=False)

    @classmethod
    def from_folder(cls, folder: str | Path, split: str = "train", max_cached: int = 6000) -> SceneBank:
        """Read a bank folder and keep the rows of one split.

        Args:
            folder: the folder with the three files named in this module's docstring.
            split: "train", "val", "test" or "unseen". "unseen" draws its targets from nouns that no other split
                shows, on test backgrounds, with test sprites as distractors.
            max_cached: how many decoded sprites to keep in memory.

        Raises:
            ValueError: unknown split, a missing file or column, or no row of that split.
        """
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
        folder = Path(folder)
        sprite_rows = _read_rows(folder / "sprites.parquet", SPRITE_COLUMNS, ("name",))
        background_rows = _read_rows(folder / "backgrounds.parquet", BACKGROUND_COLUMNS, ("kind",))
        vocabulary = _read_vocabulary(folder / "vocabulary.json")
        unseen = {row["noun"] for row in sprite_rows if row["split"] == "unseen"}
        kept = _rows_of_split(sprite_rows, split, ("unseen", "test") if split == "unseen" else (split,), folder)
        backdrops = _rows_of_split(background_rows, split, ("test" if split == "unseen" else split,), folder)
        hidden = set() if split == "unseen" else unseen
        return cls(
            split=split,
            sprites=[_sprite(i, row, split, hidden) for i, row in enumerate(kept)],
            backgrounds=[_background(i, row) for i, row in enumerate(backdrops)],
            vocabulary=vocabulary,
            sprite_bytes=[_encoded(row["image"]) for row in kept],
            background_bytes=[_encoded(row["image"]) for row in backdrops],
            max_cached=max_cached,
        )

    def sprite_pixels(self, index: int) -> np.ndarray:
        """The sprite cropped to its visible part: RGBA uint8, shape (h, w, 4). Do not write into it."""
        pixels = self._pixels.get(index)
        if pixels is None:
            pixels = _decode_sprite(self.sprite_bytes[index], self.sprites[index].id)
            self._pixels[index] = pixels
            if len(self._pixels) > self.max_cached:
                self._pixels.popitem(last=False)
        return pixels

    def background_image(self, index: int) -> Image.Image:
        """The backdrop at its stored size, RGB. Do not draw on it."""
        if index not in self._backdrops:
            self._backdrops[index] = Image.open(io.BytesIO(self.background_bytes[index])).convert("RGB")
        return self._backdrops[index]

    def preload(self) -> None:
        """Decode everything now, so that forked workers share the pictures instead of each decoding its own."""
        for index in range(len(self.sprites)):
            self.sprite_pixels(index)
        for index in range(len(self.backgrounds)):
            self.background_image(index)

    @property
    def groups(self) -> dict[str, dict[str, dict[str, list[int]]]]:
        """Sprite indices by style, then noun, then identity."""
        if self._groups is None:
            self._groups = {}
            for sprite in self.sprites:
                nouns = self._groups.setdefault(sprite.style, {})
                nouns.setdefault(sprite.noun, {}).setdefault(sprite.id, []).append(sprite.index)
        return self._groups

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": OrderedDict(), "_backdrops": {}}


def _read_rows(path: Path, required: tuple[str, ...], optional: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(
            f"The scene bank has no file {path.name!r} in {str(path.parent)!r}. "
            "Build the bank first, or pass the folder that holds sprites.parquet, backgrounds.parquet and "
            "vocabulary.json."
        )
    present = pq.read_schema(path).names
    missing = [name for name in required if name not in present]
    if missing:
        raise ValueError(
            f"{str(path)!r} lacks the column(s) {', '.join(missing)}; it has {', '.join(present)}. "
            "Rebuild the bank with these columns."
        )
    return pq.read_table(path, columns=[*required, *(name for name in optional if name in present)]).to_pylist()


def _read_vocabulary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"The scene bank has no file {path.name!r} in {str(path.parent)!r}. Build the bank first, or write a JSON "
            f"object with the keys {', '.join(VOCABULARY_KEYS)}."
        )
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error}); build the bank anew.") from error
    missing = [key for key in VOCABULARY_KEYS if key not in vocabulary]
    if missing:
        raise ValueError(f"{str(path)!r} lacks the key(s) {', '.join(missing)}; add them (an empty object will do).")
    return vocabulary


def _rows_of_split(rows: list[dict[str, Any]], split: str, kept: tuple[str, ...], folder: Path) -> list[dict[str, Any]]:
    chosen = [row for row in rows if row["split"] in kept]
    if not any(row["split"] == kept[0] for row in chosen):
        have = sorted({str(row["split"]) for row in rows})
        raise ValueError(
            f"The bank {str(folder)!r} has no rows with split {kept[0]!r} (needed for {split!r}); it has {have}. "
            "Choose another split or rebuild the bank."
        )
    return chosen


def _encoded(image: dict[str, Any] | bytes) -> bytes:
    return image["bytes"] if isinstance(image, dict) else image


def _sprite(index: int, row: dict[str, Any], split: str, hidden: set[str]) -> Sprite:
    # Unseen nouns must not leak into the other splits' sentences through a synonym.
    photo, src = bool(row["photo"]), str(row["src"])
    return Sprite(
        index=index,
        noun=row["noun"],
        name=row.get("name") or row["noun"],
        synonyms=tuple(word for word in row["synonyms"] or () if word not in hidden),
        categories=tuple(row["categories"] or ()),
        color=row["color"] or None,
        photo=photo,
        src=src,
        id=str(row["id"]),
        style="photo" if photo else "render" if src in RENDER_SOURCES else "stylised",
        target=row["split"] == split,
    )


def _background(index: int, row: dict[str, Any]) -> Background:
    plain = row.get("kind") != "photo"
    return Background(index=index, floor=float(row["floor"]), avoid=tuple(row["avoid"] or ()), plain=plain)


def _decode_sprite(encoded: bytes, name: str) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGBA"))
    solid = pixels[..., 3] >= ALPHA_CUT
    if not solid.any():
        raise ValueError(f"The sprite {name!r} is fully transparent; remove its row from sprites.parquet.")
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    return np.ascontiguousarray(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
