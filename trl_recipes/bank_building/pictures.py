"""Pictures as the bank stores them: cropped, small, WebP; and the name of a cut-out's colour."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ..scenes.bank import ALPHA_CUT

SPRITE_SIDE = 160
BACKDROP_SIZE = (640, 512)
DOMINANT = 0.55
# Upper ends of hue ranges, degrees.
HUES = (
    (12, "red"),
    (41, "orange"),
    (68, "yellow"),
    (165, "green"),
    (256, "blue"),
    (292, "purple"),
    (345, "pink"),
    (360, "red"),
)


def cut_out(picture: Image.Image, side: int = SPRITE_SIDE) -> Image.Image:
    """The visible part of a picture with alpha, its longest side `side` pixels at most.

    Raises:
        ValueError: nothing is visible, nothing is transparent, or what is left is too small to see.
    """
    picture = picture.convert("RGBA")
    solid = np.asarray(picture)[..., 3] >= ALPHA_CUT
    if not solid.any():
        raise ValueError("nothing in it is opaque")
    if solid.all():
        raise ValueError("it has no transparent background")
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    picture = picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    if min(picture.size) < 8:
        raise ValueError(f"only {picture.width}x{picture.height} pixels of it are visible")
    return picture


def encode(picture: Image.Image, quality: int = 88) -> bytes:
    """WebP bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def backdrop(picture: Image.Image) -> Image.Image:
    """RGB, at most 640x512; a transparent sky becomes blue, paler towards the horizon."""
    picture.draft("RGB", (2 * BACKDROP_SIZE[0], 2 * BACKDROP_SIZE[1]))
    transparent = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
    picture = picture.convert("RGBA" if transparent else "RGB")
    picture.thumbnail(BACKDROP_SIZE, Image.Resampling.LANCZOS)
    if transparent:
        height = np.linspace(0, 1, picture.height)[:, None, None]
        sky = np.array([105, 155, 215]) * (1 - height) + np.array([225, 232, 238]) * height
        pixels = np.broadcast_to(sky, (picture.height, picture.width, 3)).astype(np.uint8)
        below = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGBA")
        below.alpha_composite(picture)
        picture = below.convert("RGB")
    return picture


def color_name(picture: Image.Image) -> str | None:
    """The colour that most of a cut-out's opaque pixels have, None where none has more than 55 %."""
    small = picture.convert("RGBA").resize((48, 48), Image.Resampling.BILINEAR)
    solid = np.asarray(small)[..., 3] >= ALPHA_CUT
    if not solid.any():
        return None
    hue, saturation, value = np.moveaxis(
        np.asarray(small.convert("RGB").convert("HSV"), dtype=np.float32)[solid], -1, 0
    )
    names = _names(hue * 360 / 255, saturation / 255, value / 255)
    found, counts = np.unique(names, return_counts=True)
    return str(found[counts.argmax()]) if counts.max() > DOMINANT * len(names) else None


def _names(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    names = np.array([name for _, name in HUES])[np.searchsorted([end for end, _ in HUES], hue, side="left").clip(0, 7)]
    names = np.where((names == "red") & (saturation < 0.55) & (value > 0.75), "pink", names)
    warm = (hue < 50) | (hue > 345)
    names = np.where(
        warm & np.isin(names, ("red", "orange", "yellow")) & (value < 0.68) & (saturation < 0.85), "brown", names
    )
    names = np.where((hue > 12) & (hue < 50) & (value < 0.6), "brown", names)
    names = np.where(saturation < 0.18, np.where(value > 0.8, "white", "grey"), names)
    return np.where((value < 0.2) | ((value < 0.3) & (saturation < 0.3)), "black", names)
