"""Compose one scene: choose sprites, place them on a background's floor, draw them and light the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from .bank import ALPHA_CUT, Background, SceneBank, Sprite
from .config import SceneConfig
from .effects import develop, jitter_sprite, warp_sprite
from .lexicon import FLYING, Lexicon


@dataclass
class SceneObject:
    """One drawn object.

    Attributes:
        index: its number in `Scene.index_map`, from 1; larger numbers are drawn over smaller ones.
        sprite: what it is.
        bbox: left, top, right, bottom of its visible pixels (right and bottom exclusive); all 0 if none.
        box: the same for the whole placed sprite; may reach beyond the picture.
        area: its in-frame area in pixels as if nothing covered it.
        visible: its visible pixels.
        visible_fraction: `visible / area`; 0 if it lies outside the picture.
        clear: True if enough of it shows for an expression to be about it.
        targetable: True if an expression may mean it: it is clear and not a mere distractor.
    """

    index: int
    sprite: Sprite
    bbox: tuple[int, int, int, int]
    box: tuple[int, int, int, int]
    area: int
    visible: int
    visible_fraction: float
    clear: bool
    targetable: bool

    @property
    def center(self) -> tuple[float, float]:
        """Middle (x, y) of the visible box, pixels."""
        return (self.bbox[0] + self.bbox[2]) / 2, (self.bbox[1] + self.bbox[3]) / 2


@dataclass
class Scene:
    """A composed picture.

    Attributes:
        image: RGB, `image_size` x `image_size`.
        objects: back to front; object i has index i + 1.
        index_map: uint8 (H, W): which object each pixel shows, 0 = background.
        background: the backdrop that was used.
        lexicon: the words of the bank that the scene was drawn from.
    """

    image: Image.Image
    objects: list[SceneObject]
    index_map: np.ndarray
    background: Background
    lexicon: Lexicon

    def mask(self, object_ids: tuple[int, ...] | list[int]) -> np.ndarray:
        """Bool (H, W): the visible pixels of these object indices; all False for no indices."""
        table = np.zeros(256, dtype=bool)
        table[list(object_ids)] = True
        return table[self.index_map]


@dataclass
class _Placed:
    sprite: Sprite
    left: int
    top: int
    width: int
    height: int
    foot: float
    flying: bool


def compose_scene(bank: SceneBank, rng: np.random.Generator, config: SceneConfig | None = None) -> Scene:
    """Draw one scene.

    Args:
        bank: where sprites and backgrounds come from.
        rng: the only source of chance: the same state gives the same scene.
        config: see `SceneConfig`; the preset "full" by default.
    """
    config = config or SceneConfig()
    lexicon = bank_lexicon(bank)
    background = bank.backgrounds[int(rng.integers(len(bank.backgrounds)))]
    canvas, floor = _backdrop(bank, background, rng, config.image_size)
    sprites = _choose_sprites(bank, lexicon, background, rng, config)
    placed = _place(bank, sprites, floor, rng, config)
    index_map = np.zeros(canvas.shape[:2], dtype=np.uint8)
    shadows = rng.random() < config.shadow_share
    areas = []
    for number, item in enumerate(placed, start=1):
        if shadows and not item.flying:
            _draw_shadow(canvas, item, rng)
        areas.append(_draw_sprite(canvas, index_map, number, item, bank, rng, config))
    image = develop(canvas, rng, config)
    return Scene(image, _describe(placed, areas, index_map, config), index_map, background, lexicon)


def bank_lexicon(bank: SceneBank) -> Lexicon:
    """The bank's lexicon, made once per bank and process."""
    lexicon = bank.__dict__.get("_lexicon")
    if lexicon is None:
        lexicon = bank.__dict__["_lexicon"] = Lexicon(bank.vocabulary, bank.sprites)
    return lexicon


def _backdrop(bank: SceneBank, background: Background, rng: np.random.Generator, size: int) -> tuple[np.ndarray, float]:
    # A square crop of 70 to 100 % of the shorter side that keeps the floor's edge inside the picture.
    picture = bank.background_image(background.index)
    width, height = picture.size
    side = min(width, height) * rng.uniform(0.7, 1.0)
    left = rng.uniform(0, width - side)
    line = background.floor * height
    first, last = (min(max(line - share * side, 0.0), height - side) for share in (0.82, 0.15))
    top = rng.uniform(first, last)
    crop = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(crop)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.array(pixels), float(np.clip((line - top) / side, 0.1, 0.85))


def _choose_sprites(
    bank: SceneBank, lexicon: Lexicon, background: Background, rng: np.random.Generator, config: SceneConfig
) -> list[Sprite]:
    count = int(rng.integers(config.min_objects, config.max_objects + 1))
    for _ in range(6):
        first = _draw_one(bank, rng, config, targets_only=True)
        # What the background already shows cannot be asked for; another object serves better.
        if not any(lexicon.clashes(term, background.avoid) for term in (first.noun, *first.categories[:1])):
            break
    chosen = [first]
    if count > 1 and rng.random() < config.group_share:
        alike = 1 + int(rng.integers(1, min(count, 4)))
        while len(chosen) < alike:
            chosen.append(_same_noun(bank, first, rng, config))
    while len(chosen) < count:
        if first.categories and rng.random() < 0.5:
            chosen.append(_same_category(bank, first, rng, config))
        else:
            chosen.append(_draw_one(bank, rng, config))
    return chosen


def _draw_one(bank: SceneBank, rng: np.random.Generator, config: SceneConfig, targets_only: bool = False) -> Sprite:
    pool = _pool(bank, targets_only)
    styles = [style for style in ("photo", "render", "stylised") if style in pool]
    weights = np.array([getattr(config, f"{style}_share") for style in styles])
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(styles), 1 / len(styles))
    nouns, noun_weights = pool[styles[_pick(rng, weights)]]
    identities = list(nouns[_pick(rng, noun_weights)].values())
    views = identities[int(rng.integers(len(identities)))]
    return bank.sprites[views[int(rng.integers(len(views)))]]


def _pool(bank: SceneBank, targets_only: bool) -> dict:
    # Nouns with many models come a little more often: weight = square root of the number of identities.
    cache = bank.__dict__.setdefault("_pools", {})
    if targets_only not in cache:
        pools = {}
        for style, nouns in bank.groups.items():
            kept = [ids for ids in nouns.values() if not targets_only or _any_target(bank, ids)]
            if kept:
                weights = np.sqrt([len(ids) for ids in kept])
                pools[style] = (kept, weights / weights.sum())
        cache[targets_only] = pools
    return cache[targets_only]


def _any_target(bank: SceneBank, identities: dict[str, list[int]]) -> bool:
    return any(bank.sprites[index].target for views in identities.values() for index in views)


def _pick(rng: np.random.Generator, weights: np.ndarray) -> int:
    return min(int(np.searchsorted(np.cumsum(weights), rng.random(), side="right")), len(weights) - 1)


def _same_noun(bank: SceneBank, first: Sprite, rng: np.random.Generator, config: SceneConfig) -> Sprite:
    pools = {style: nouns[first.noun] for style, nouns in bank.groups.items() if first.noun in nouns}
    weights = np.array([getattr(config, f"{style}_share") + 1e-9 for style in pools])
    own = bank.groups[first.style][first.noun]
    # Mostly the first one's style, so that photographs stay as frequent as asked for.
    other = list(pools.values())[_pick(rng, weights / weights.sum())]
    identities = own if len(own) > 1 or rng.random() < 0.5 else other
    views = list(identities.values())[int(rng.integers(len(identities)))]
    return bank.sprites[views[int(rng.integers(len(views)))]]


def _same_category(bank: SceneBank, first: Sprite, rng: np.random.Generator, config: SceneConfig) -> Sprite:
    for _ in range(12):
        other = _draw_one(bank, rng, config)
        if other.noun != first.noun and first.categories[0] in other.categories:
            return other
    return other


def _place(
    bank: SceneBank, sprites: list[Sprite], floor: float, rng: np.random.Generator, config: SceneConfig
) -> list[_Placed]:
    # A scene has one typical size; each object varies around it, and shrinks towards the floor's far edge.
    low, high = math.log(config.min_scale), math.log(config.max_scale)
    crowd = (len(sprites) - 1) / 8
    typical = low + (high - low) * float(rng.beta(1.6 + crowd, 1.2 + crowd))
    placed: list[_Placed] = []
    for sprite in sprites:
        options = [_try_place(bank, sprite, typical, (low, high), floor, rng, config) for _ in range(4)]
        # Now and then the first option is taken even if it overlaps, so that occlusion is learned too.
        best = options[0] if rng.random() < 0.15 else min(options, key=lambda one: _overlap(one, placed))
        placed.append(best)
    return sorted(placed, key=lambda one: one.foot)


def _try_place(
    bank: SceneBank,
    sprite: Sprite,
    typical: float,
    bounds: tuple[float, float],
    floor: float,
    rng: np.random.Generator,
    config: SceneConfig,
) -> _Placed:
    size = config.image_size
    rows, columns = bank.sprite_pixels(sprite.index).shape[:2]
    depth = float(rng.random())
    log_scale = typical + rng.normal(0, 0.22) + math.log(0.65 + 0.5 * depth)
    longest = size * math.exp(min(max(log_scale, bounds[0]), bounds[1]))
    factor = longest / max(rows, columns)
    width, height = max(3, round(columns * factor)), max(3, round(rows * factor))
    flying = sprite.noun in FLYING and rng.random() < 0.7
    if flying:
        foot = rng.uniform(height, max(height + 1.0, size * 0.85))
    else:
        foot = size * (floor + (1.0 - floor) * (0.12 + 0.86 * depth))
        foot = min(max(foot, height + 1.0), size - 1.0)
    spare = config.overflow * width if rng.random() < config.overflow_share else 0.0
    left = rng.uniform(-spare, max(size - width + spare, 1e-6))
    drop = rng.uniform(0, config.overflow * height) if spare and rng.random() < 0.4 and foot > 0.9 * size else 0.0
    return _Placed(sprite, round(left), round(foot - height + drop), width, height, foot + drop, flying)


def _overlap(one: _Placed, others: list[_Placed]) -> float:
    # The largest share of the smaller of two boxes that the other one covers.
    worst = 0.0
    for other in others:
        wide = min(one.left + one.width, other.left + other.width) - max(one.left, other.left)
        tall = min(one.top + one.height, other.top + other.height) - max(one.top, other.top)
        if wide > 0 and tall > 0:
            worst = max(worst, wide * tall / min(one.width * one.height, other.width * other.height))
    return worst


@lru_cache(maxsize=1)
def _shadow_disc() -> Image.Image:
    y, x = np.mgrid[-1:1:48j, -1:1:48j]
    return Image.fromarray((255 * np.clip(1.0 - np.hypot(x, y), 0, 1) ** 1.2).astype(np.uint8))


def _draw_shadow(canvas: np.ndarray, item: _Placed, rng: np.random.Generator) -> None:
    strength = rng.uniform(0.3, 0.65)
    width = max(4, round(item.width * rng.uniform(1.05, 1.35)))
    height = max(3, round(item.width * rng.uniform(0.16, 0.3)))
    left = round(item.left + (item.width - width) / 2 + rng.uniform(-0.08, 0.08) * item.width)
    top = round(item.top + item.height - height * 0.6)
    rows, columns, inner = _clip(left, top, width, height, canvas.shape)
    if inner is None:
        return
    disc = np.asarray(_shadow_disc().resize((width, height), Image.Resampling.BILINEAR))[inner]
    light = 256 - (disc * strength).astype(np.uint16)
    canvas[rows, columns] = (canvas[rows, columns] * light[..., None]) >> 8


def _draw_sprite(
    canvas: np.ndarray,
    index_map: np.ndarray,
    number: int,
    item: _Placed,
    bank: SceneBank,
    rng: np.random.Generator,
    config: SceneConfig,
) -> int:
    # Returns the in-frame area in pixels.
    picture = Image.fromarray(bank.sprite_pixels(item.sprite.index))
    if config.warp > 0:
        picture = warp_sprite(picture, rng, config.warp)
    how = Image.Resampling.BILINEAR if item.width <= picture.width else Image.Resampling.BICUBIC
    pixels = np.asarray(picture.resize((item.width, item.height), how))
    if rng.random() < config.flip_share:
        pixels = pixels[:, ::-1]
    pixels = jitter_sprite(pixels, rng, config.jitter)
    rows, columns, inner = _clip(item.left, item.top, item.width, item.height, canvas.shape)
    if inner is None:
        return 0
    pixels = pixels[inner]
    alpha = pixels[..., 3:].astype(np.int32)
    below = canvas[rows, columns].astype(np.int32)
    canvas[rows, columns] = below + (pixels[..., :3] - below) * alpha // 255
    solid = pixels[..., 3] >= ALPHA_CUT
    index_map[rows, columns][solid] = number
    return int(np.count_nonzero(solid))


def _clip(
    left: int, top: int, width: int, height: int, shape: tuple[int, ...]
) -> tuple[slice, slice, tuple[slice, slice] | None]:
    # The box's part inside the picture, in the picture's and in the box's own pixels; None if there is none.
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, shape[1]), min(top + height, shape[0])
    if x0 >= x1 or y0 >= y1:
        return slice(0), slice(0), None
    return slice(y0, y1), slice(x0, x1), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _describe(placed: list[_Placed], areas: list[int], index_map: np.ndarray, config: SceneConfig) -> list[SceneObject]:
    least = config.min_target_pixels * index_map.size
    objects = []
    for number, (item, area) in enumerate(zip(placed, areas, strict=True), start=1):
        rows, columns, _ = _clip(item.left, item.top, item.width, item.height, index_map.shape)
        seen = index_map[rows, columns] == number
        visible = int(np.count_nonzero(seen))
        bbox = (0, 0, 0, 0)
        if visible:
            ys, xs = np.flatnonzero(seen.any(1)) + rows.start, np.flatnonzero(seen.any(0)) + columns.start
            bbox = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
        fraction = visible / area if area else 0.0
        enough = fraction >= config.min_visible and visible >= max(least, 1)
        box = (item.left, item.top, item.left + item.width, item.top + item.height)
        target = enough and item.sprite.target
        objects.append(SceneObject(number, item.sprite, bbox, box, area, visible, fraction, enough, target))
    return objects
