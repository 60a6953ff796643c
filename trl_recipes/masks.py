"""Masks of composed scenes for training and judging a visual tokenizer."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from .cache_settings import start_anew, was_made_of
from .scenes import SceneBank, SceneConfig, SceneDataset
from .settings_files import hash_files

PRESET_SHARES = (("easy", 0.3), ("medium", 0.3), ("full", 0.4))
SCENES_PER_TASK = 16
FIXED_POINT = 2**22  # of Pillow's weights for 8-bit pictures

_scenes: SceneDataset | None = None  # what the processes that compose masks inherit


def _packed_masks(start: int) -> np.ndarray:
    """Masks (n, H, W / 8) of a few scenes, as bits."""
    assert _scenes is not None
    masks = []
    for index in range(start, min(start + SCENES_PER_TASK, len(_scenes))):
        scene, expressions = _scenes.scene(index)
        masks += [scene.mask(e.object_ids) for e in expressions if e.object_ids]
    return np.packbits(np.stack(masks), axis=-1) if masks else np.empty((0, 0, 0), np.uint8)


def _set_scenes(scenes: SceneDataset) -> None:
    global _scenes
    _scenes = scenes


def _preset_masks(scenes: SceneDataset, wanted: int, workers: int, label: str) -> np.ndarray:
    """The first `wanted` masks of the scenes, in order, whatever the number of processes."""
    found, count = [], 0
    _set_scenes(scenes)
    starts = range(0, len(scenes), SCENES_PER_TASK)
    # processes are never killed: one that died while it handed masks over would leave everybody waiting for its lock
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _set_scenes, (scenes,)) if workers > 1 else None
    try:
        with tqdm(total=wanted, desc=label) as bar:
            for packed in pool.map(_packed_masks, starts) if pool else map(_packed_masks, starts):
                if len(packed):
                    found.append(packed)
                    count += len(packed)
                    bar.update(len(packed))
                if count >= wanted:
                    break
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)  # what comes beyond that is not needed
    return np.concatenate(found)[:wanted]


def compose_masks(
    bank_folder: str | Path, split: str, count: int, seed: int, cache: Path | None = None, workers: int = 1
) -> np.ndarray:
    """`count` target masks (count, 256, 256) bool of scenes from all presets; packed to bits in `cache` when given.

    They are the same for any number of `workers` (processes). A cache of another bank, split, seed or count is made
    anew; of one that nothing is said about, as many as are asked for are taken, of all presets.
    """
    files = [Path(bank_folder, name) for name in ("sprites.parquet", "backgrounds.parquet", "vocabulary.json")]
    settings: dict[str, Any] = {}
    if cache is not None:
        bank_files = hash_files([file for file in files if file.is_file()])
        settings = {"bank": bank_files, "split": split, "seed": seed, "count": count}
    packed = np.load(cache, mmap_mode="r") if cache is not None and was_made_of(cache, settings) else ()
    if len(packed) >= count:
        chosen = np.linspace(0, len(packed) - 1, count).round().astype(int)  # of all presets
        return np.unpackbits(packed[chosen], axis=-1).view(bool)
    packed = ()  # no longer mapped, or some systems would not delete it
    if cache is not None:
        start_anew(cache, settings)
    bank, upto, have = SceneBank.from_folder(bank_folder, split), 0.0, 0
    parts = []
    for preset, share in PRESET_SHARES:
        upto += share
        wanted = round(count * upto) - have
        have += wanted
        if wanted:
            scenes = SceneDataset(bank, SceneConfig.preset(preset), seed, length=count, expressions_per_scene=4)
            parts.append(_preset_masks(scenes, wanted, workers, f"composing {split} masks ({preset})"))
    packed = np.concatenate(parts)
    if cache is not None:
        part = cache.with_suffix(".part.npy")
        np.save(part, packed)
        part.replace(cache)  # a run that is killed leaves no half of it
    return np.unpackbits(packed, axis=-1).view(bool)


def find_photos(folder: Path) -> list[Path]:
    """The pictures in a folder, by name; what else lies there is told and left out.

    Raises:
        ValueError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ValueError(f"--photos {str(folder)!r} is no folder")
    photos, others = [], []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            with Image.open(path):  # reads its header only
                photos.append(path)
        except UnidentifiedImageError:
            others.append(path.name)
    if not photos:
        raise ValueError(f"--photos {str(folder)!r} holds no picture")
    if others:
        print(f"{folder}: {len(others)} of {len(photos) + len(others)} files are no pictures, e.g. {others[0]}")
    return photos


def bicubic_weights(size: int, side: int, start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Matrices (B, side, size) that resize `start .. start + length` (B,) of a line of `size` pixels to `side` pixels.

    The filter is that of Pillow's `resize(..., BICUBIC, box=...)`: made wider where it shrinks, cut off at the ends.
    """
    scale = length / side
    width = scale.clamp(min=1.0)
    centers = start[:, None] + (torch.arange(side, device=start.device) + 0.5) * scale[:, None]
    pixels = torch.arange(size, device=start.device) + 0.5
    x = ((pixels - centers[:, :, None]) / width[:, None, None]).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(2, keepdim=True)


def resize_like_pillow(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Grey pictures (..., H, W) of whole numbers 0 to 255 in double precision, as Pillow's `resize((side, side),
    BICUBIC)` makes them, to the last bit: rows first, in fixed point, and cut to 8 bits after rows and columns.
    """
    for axis in (-1, -2):
        size = pictures.shape[axis]
        if size != side:
            whole = torch.tensor([[0.0], [size]], dtype=torch.float64, device=pictures.device)
            weights = (bicubic_weights(size, side, *whole)[0] * FIXED_POINT).round()
            sums = pictures.transpose(axis, -1) @ weights.T
            pictures = ((sums / FIXED_POINT + 0.5).floor().clamp(0, 255)).transpose(axis, -1)
    return pictures


def uniform(seed: int, indices: torch.Tensor, draws: int) -> torch.Tensor:
    """Numbers (B, draws) in [0, 1) that depend on the seed and on each index alone, made where the indices are."""
    bits = indices.long()[:, None] * draws + torch.arange(draws, device=indices.device)
    bits = bits + (seed * 0x9E3779B1 & 0x7FFFFFFF)
    for factor in (0x7FEB352D, 0x846CA68B, 0x7FEB352D):
        bits = bits & 0xFFFFFFFF
        bits = ((bits ^ bits >> 16) * factor) & 0xFFFFFFFF
    return (bits ^ bits >> 15).float().div(2**32).clamp(max=1 - 2**-24)  # no doubles: Apple GPUs have none


class MaskPictures:
    """Masks as black and white pictures (B, 3, side, side) in [-1, 1], mirrored and zoomed at random.

    Batches are made where the masks are: on a GPU, a fraction of a millisecond each. A picture depends on (seed, index)
    alone, so that a resumed run sees the same pictures.

    Args:
        masks: bool (N, H, W).
        side: side of the picture.
        seed: of the augmentation; None for none.
        photos: pictures to mix in (paths), and `photo_share`, how often.
        device: where the masks are kept, a byte a pixel.
    """

    def __init__(
        self,
        masks: np.ndarray,
        side: int,
        seed: int | None = 0,
        photos: list[Path] | None = None,
        photo_share: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.masks = torch.tensor(masks, device=device)
        self.side, self.seed = side, seed
        self.photos, self.photo_share = photos or [], photo_share if photos else 0.0

    def batch(self, indices: torch.Tensor, side: int | None = None) -> torch.Tensor:
        """Pictures of indices (B,), of any size: mask i is that of index i, i + N, i + 2 N and so on.

        `side`: of the pictures, if another than usual; they show the same.
        """
        indices = indices.to(self.masks.device)
        drawn = uniform(self.seed or 0, indices, 6)
        zoom = torch.ones_like(drawn[:, 0]) if self.seed is None else 0.55 + 0.45 * drawn[:, 0]
        left, top = (1 - zoom) * drawn[:, 1], (1 - zoom) * drawn[:, 2]
        white = self.masks[indices % len(self.masks)].float()
        pictures = self.resized(white, zoom, left, top, side)[:, None].expand(-1, 3, -1, -1)
        if self.photo_share:
            pictures = pictures.clone()
            for place in (drawn[:, 4] < self.photo_share).nonzero()[:, 0].tolist():
                photo = self.photo(int(drawn[place, 5] * len(self.photos)))
                resized = self.resized(photo, zoom[place].expand(3), left[place].expand(3), top[place].expand(3), side)
                pictures[place] = resized
        pictures = pictures * 2 - 1
        if self.seed is not None:
            pictures = torch.where((drawn[:, 3] < 0.5)[:, None, None, None], pictures.flip(3), pictures)
        return pictures.contiguous(memory_format=torch.channels_last)

    def resized(
        self, planes: torch.Tensor, zoom: torch.Tensor, left: torch.Tensor, top: torch.Tensor, side: int | None = None
    ) -> torch.Tensor:
        """Planes (B, H, W) in [0, 1], cut out and resized to (B, side, side)."""
        height, width = planes.shape[1:]
        rows = bicubic_weights(height, side or self.side, top * height, zoom * height)
        columns = bicubic_weights(width, side or self.side, left * width, zoom * width)
        with torch.autocast(planes.device.type, enabled=False):
            wide = (planes @ columns.transpose(1, 2)).clamp(0, 1)
            return (rows @ wide).clamp(0, 1).mul(255).round().div(255)  # flat areas are exactly flat

    def photo(self, number: int) -> torch.Tensor:
        image = Image.open(self.photos[number]).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(self.masks.device).float() / 255
