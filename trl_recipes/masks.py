"""Masks of composed scenes for training and judging a visual tokenizer."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .scenes import SceneBank, SceneConfig, SceneDataset

PRESET_SHARES = (("easy", 0.3), ("medium", 0.3), ("full", 0.4))


def compose_masks(bank_folder: str | Path, split: str, count: int, seed: int, cache: Path | None = None) -> np.ndarray:
    """`count` target masks (count, 256, 256) bool of scenes from all presets; packed to bits in `cache` when given."""
    packed = np.load(cache, mmap_mode="r") if cache is not None and cache.exists() else ()
    if len(packed) >= count:
        return np.unpackbits(packed[:count], axis=-1).astype(bool)
    bank, upto = SceneBank.from_folder(bank_folder, split), 0.0
    found: list[np.ndarray] = []
    for preset, share in PRESET_SHARES:
        upto += share
        wanted = round(count * upto) - len(found)
        dataset = SceneDataset(bank, SceneConfig.preset(preset), seed, length=count, expressions_per_scene=4)
        masks: list[np.ndarray] = []
        with tqdm(total=wanted, desc=f"composing {split} masks ({preset})") as bar:
            for index in range(len(dataset)):
                scene, expressions = dataset.scene(index)
                new = [scene.mask(e.object_ids) for e in expressions if e.object_ids]
                masks += new
                bar.update(len(new))
                if len(masks) >= wanted:
                    break
        found += masks[:wanted]
    stacked = np.stack(found)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(".part.npy")
        np.save(part, np.packbits(stacked, axis=-1))
        part.replace(cache)  # a run that is killed leaves no half of it
    return stacked


class MaskPictures(Dataset):
    """Masks as black and white pictures `{"pixel_values": (3, side, side) in [-1, 1]}`, mirrored and zoomed at random.

    Item i of epoch e depends on (seed, i) alone, so that a resumed run sees the same pictures.

    Args:
        masks: bool (N, H, W).
        side: side of the picture.
        seed: of the augmentation; None for none.
        photos: pictures to mix in (paths), and `photo_share`, how often.
    """

    def __init__(
        self,
        masks: np.ndarray,
        side: int,
        seed: int | None = 0,
        photos: list[Path] | None = None,
        photo_share: float = 0.0,
        length: int | None = None,
    ) -> None:
        self.masks, self.side, self.seed = masks, side, seed
        self.photos, self.photo_share = photos or [], photo_share if photos else 0.0
        self.length = length or len(masks)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed or 0, index])
        if self.seed is not None and rng.random() < self.photo_share:
            image = Image.open(self.photos[rng.integers(len(self.photos))]).convert("RGB")
        else:
            image = Image.fromarray(self.masks[index % len(self.masks)])
            image = image.convert("L").convert("RGB")
        box = None
        if self.seed is not None:
            width, height = image.size
            zoom = rng.uniform(0.55, 1.0)
            left, top = rng.uniform(0, 1 - zoom, 2)
            box = (left * width, top * height, (left + zoom) * width, (top + zoom) * height)
        image = image.resize((self.side, self.side), Image.Resampling.BICUBIC, box=box)
        if self.seed is not None and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixel_values": pixels}
