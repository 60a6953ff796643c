"""What a camera does to a composed picture: light, tint, blur, noise and JPEG."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from .config import SceneConfig

_NOISE_SIDE = 640


def jitter_sprite(pixels: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """RGBA uint8 (h, w, 4) with its brightness, contrast and tint changed a little; the colour's name stays."""
    if strength <= 0:
        return pixels
    gain = rng.uniform(1 - 0.16 * strength, 1 + 0.12 * strength) * rng.normal(1.0, 0.025 * strength, 3)
    contrast = rng.uniform(1 - 0.12 * strength, 1 + 0.12 * strength)
    # One table per channel is far cheaper than arithmetic on every pixel.
    levels = np.arange(256, dtype=np.float32)[:, None]
    tables = np.clip(((levels - 128) * contrast + 128) * gain, 0, 255).astype(np.uint8)
    changed = np.empty_like(pixels)
    for channel in range(3):
        changed[..., channel] = tables[:, channel][pixels[..., channel]]
    changed[..., 3] = pixels[..., 3]
    return changed


def warp_sprite(picture: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """A picture of the same size, RGBA, as if seen from elsewhere: each corner shows what is up to `strength` times the
    sides away from it. What comes from outside is transparent."""
    corners = np.array([[0, 0], [0, 1], [1, 1], [1, 0]]) + rng.uniform(-strength, strength, (4, 2))
    quad = (corners * picture.size).ravel().tolist()
    return picture.transform(picture.size, Image.Transform.QUAD, quad, Image.Resampling.BILINEAR)


def develop(canvas: np.ndarray, rng: np.random.Generator, config: SceneConfig) -> Image.Image:
    """Light gradient, tint, blur, noise and JPEG on RGB uint8 (H, W, 3); returns the finished RGB picture."""
    size = canvas.shape[0]
    if rng.random() < config.gradient_share:
        canvas = _light(canvas, rng)
    if config.jitter > 0:
        canvas = _tint(canvas, rng, config.jitter)
    image = Image.fromarray(canvas)
    if rng.random() < config.blur_share:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.1)) * size / 256))
    if rng.random() < config.noise_share:
        image = _noisy(image, rng)
    if rng.random() < config.jpeg_share:
        low, high = config.jpeg_quality
        image = _compressed(image, int(rng.integers(low, high + 1)))
    return image


def _light(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.28)
    ramp = np.linspace(-0.5, 0.5, canvas.shape[0], dtype=np.float32)
    gain = 1 + depth * (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None])
    return _scaled(canvas, (gain * 256).astype(np.uint16)[..., None])


def _tint(canvas: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    gain = rng.uniform(1 - 0.18 * strength, 1 + 0.12 * strength) * rng.normal(1.0, 0.025 * strength, 3)
    offset = rng.uniform(-8, 8) * strength
    levels = np.arange(256, dtype=np.float32)[:, None]
    tables = np.clip(levels * gain + offset, 0, 255).astype(np.uint8)
    image = Image.fromarray(canvas).point(tables.T.ravel().tolist())
    return np.asarray(image)


def _scaled(canvas: np.ndarray, gain: np.ndarray) -> np.ndarray:
    # Gains stay below 1.25, so the product fits 32 bits easily and 16 bits not.
    return np.minimum((canvas * gain.astype(np.uint32)) >> 8, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _noise_field() -> np.ndarray:
    # Drawing 200,000 normals takes longer than the rest of a scene: cut each scene's noise out of one fixed field.
    return np.random.default_rng(0).standard_normal((_NOISE_SIDE, _NOISE_SIDE, 3), dtype=np.float32)


def _noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image)
    rows, columns = pixels.shape[:2]
    top, left = (int(rng.integers(_NOISE_SIDE)) for _ in range(2))
    field = _noise_field()
    if top + rows > _NOISE_SIDE or left + columns > _NOISE_SIDE:
        if rows <= _NOISE_SIDE and columns <= _NOISE_SIDE:
            top, left = top % (_NOISE_SIDE - rows + 1), left % (_NOISE_SIDE - columns + 1)
        else:
            field = np.take(field, np.arange(top, top + rows) % _NOISE_SIDE, axis=0)
            field = np.take(field, np.arange(left, left + columns) % _NOISE_SIDE, axis=1)
            top = left = 0
    noise = field[top : top + rows, left : left + columns] * np.float32(rng.uniform(1.0, 7.0))
    noise += pixels
    return Image.fromarray(np.clip(noise, 0, 255, out=noise).astype(np.uint8))


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
