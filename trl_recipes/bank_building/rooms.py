"""Backgrounds of rooms: a floor and a wall with Sweet Home 3D's textures, in perspective."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from .rows import UNREADABLE, Row, Workplace, backdrop_row
from .tables import Backdrop

CATALOGUE = "com/eteks/sweethome3d/io/DefaultTexturesCatalog.properties"
COUNT = 150
SIZE = (512, 384)
OVERSAMPLE = 2  # against moire where the floor is far away
PLAIN = 0.35  # share of walls in one colour
SHOWS = {"grass": ("grass", "plant"), "boxTree": ("plant", "bush", "hedge")}


@dataclass(frozen=True)
class Texture:
    """A tile of `width` x `height` centimetres; `pixels` is (H, W, 3), 0-255."""

    name: str
    category: str
    width: float
    height: float
    pixels: np.ndarray


def read_textures(jar: zipfile.ZipFile, problems: list[str]) -> tuple[list[Texture], str]:
    """Textures for floors and walls, and the catalogue's licence."""
    entries = read_properties(jar.read(CATALOGUE).decode("latin-1"))
    found = []
    for number in sorted({int(key.partition("#")[2]) for key in entries if re.fullmatch(r"image#\d+", key)}):
        image = entries[f"image#{number}"].lstrip("/")
        category = entries.get(f"category#{number}", "")
        if category not in ("Floor", "Wall"):
            continue
        try:
            pixels = np.asarray(Image.open(io.BytesIO(jar.read(image))).convert("RGB"), dtype=np.float32)
            sizes = float(entries[f"width#{number}"]), float(entries[f"height#{number}"])
        except UNREADABLE as error:
            problems.append(f"{image}: {error}")
            continue
        found.append(Texture(image.rpartition("/")[2].partition(".")[0], category, *sizes, pixels))
    return found, entries.get("license", "not stated").strip()


def read_properties(text: str) -> dict[str, str]:
    """The `key=value` lines of a Java properties file; `\\uXXXX` is resolved."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.lstrip().startswith("#"))
    return {
        key.strip(): re.sub(r"\\u([0-9A-Fa-f]{4})", lambda code: chr(int(code[1], 16)), value.strip())
        for key, _, value in pairs
    }


def draw_room(floor: Texture, wall: Texture | None, rng: np.random.Generator) -> tuple[Image.Image, float]:
    """A room seen at eye level, RGB of 512x384, and the height of the floor's far edge (fraction from the top)."""
    width, height = (OVERSAMPLE * side for side in SIZE)
    edge = rng.uniform(0.3, 0.6)
    horizon = edge - rng.uniform(0.12, 0.3)
    depth, focal = rng.uniform(250, 450), width * rng.uniform(0.9, 1.4)  # centimetres; pixels
    column = np.arange(width, dtype=np.float32)[None] - np.float32(width * rng.uniform(0.35, 0.65))
    row = np.arange(height, dtype=np.float32)[:, None] / height
    line = int(np.searchsorted(row[:, 0], edge))
    far = depth * (edge - horizon) / (row[line:] - horizon)  # distance of what a pixel of the floor shows
    below = _tiled(floor, column * far / focal, far + 0 * column)
    if wall is None:
        above = np.broadcast_to(_wall_color(rng), (line, width, 3))
    else:
        above = _tiled(
            wall, column * depth / focal + 0 * row[:line], (row[:line] - edge) * height * depth / focal + 0 * column
        )
    picture = np.concatenate([above, below]) * _light(row, column / width, edge, rng)[..., None]
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    return image.resize(SIZE, Image.Resampling.BOX), float(edge)


def _tiled(texture: Texture, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # x and y in centimetres from any origin; nearest pixel, made smooth by the oversampling.
    rows, columns = texture.pixels.shape[:2]
    left = (x / texture.width % 1 * columns).astype(int).clip(0, columns - 1)
    top = (y / texture.height % 1 * rows).astype(int).clip(0, rows - 1)
    return texture.pixels[top, left]


def _wall_color(rng: np.random.Generator) -> np.ndarray:
    return (rng.uniform(150, 245) * (1 - rng.uniform(0, 0.25, 3))).astype(np.float32)


def _light(row: np.ndarray, column: np.ndarray, edge: float, rng: np.random.Generator) -> np.ndarray:
    corner = 1 - rng.uniform(0.15, 0.4) * np.exp(-np.abs(row - edge) / 0.06)
    return corner * (1 + rng.uniform(-0.35, 0.35) * column) * (0.9 + rng.uniform(0, 0.2) * row)


def room_rows(work: Workplace) -> Iterator[Row]:
    """150 rooms; the same package always gives the same ones."""
    path = work.unpacked["sweethome3d"] / "usr/share/sweethome3d/sweethome3d.jar"
    with zipfile.ZipFile(path) as jar:
        textures, licence = read_textures(jar, work.problems)
    floors = [texture for texture in textures if texture.category == "Floor"]
    walls = [texture for texture in textures if texture.category == "Wall"]
    if not floors or not walls:
        raise ValueError(f"{path} holds no textures for floors and walls; pass --skip rooms.")
    for number in tqdm(range(COUNT), desc="rooms", unit="room"):
        rng = np.random.default_rng([number, 3])
        floor = floors[int(rng.integers(len(floors)))]
        wall = None if rng.random() < PLAIN else walls[int(rng.integers(len(walls)))]
        picture, edge = draw_room(floor, wall, rng)
        names = [texture.name for texture in (floor, wall) if texture is not None]
        avoid = tuple(word for name in names for word in SHOWS.get(name, ()))
        split = "test" if number % 7 == 3 else "val" if number % 10 == 5 else "train"
        one = Backdrop(f"room{number} ({', '.join(names)})", edge, avoid, split)
        yield backdrop_row(picture, one, "room", "room", ("eTeks", licence))
