"""Tokens that `VARTokenizer.search` finds for the masks of a training set: found once, kept, and gone on with."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_argenseg import VARTokenizer

from .cache_settings import start_anew, was_made_of
from .masks import MaskPictures
from .settings_files import fingerprint

BATCH = 16
MISSING = -1


def hash_masks(masks: torch.Tensor) -> str:
    """A short hash of masks (N, H, W)."""
    digest = hashlib.sha256(str(tuple(masks.shape)).encode())
    for part in masks.split(256):  # they may be on a GPU
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def searched_tokens(model: VARTokenizer, pictures: MaskPictures, steps: int, cache: Path) -> torch.Tensor:
    """Visual tokens (N, T) of the N masks of `pictures`, without augmentation.

    They are written to `cache` (.npy) batch by batch: a run that was stopped finds what is missing. A file of another
    tokenizer, other masks or steps is begun anew.

    Raises:
        ValueError: the pictures are augmented, so that a mask has not the same tokens always.
    """
    if pictures.seed is not None:
        raise ValueError("tokens are kept for masks as they are: make the pictures with seed=None")
    shape = (len(pictures.masks), model.config.num_tokens)
    settings = {"tokenizer": fingerprint(model), "masks": hash_masks(pictures.masks), "search_steps": steps}
    found = np.load(cache, mmap_mode="r+") if was_made_of(cache, settings) else None
    if found is None or found.shape != shape:
        found = None  # no longer mapped, or some systems would not delete it
        start_anew(cache, settings)
        found = np.lib.format.open_memmap(cache, mode="w+", dtype=np.int32, shape=shape)
        found[:] = MISSING
    missing = torch.from_numpy(np.flatnonzero((found == MISSING).any(1)))
    dtype, model.decode_dtype = model.decode_dtype, torch.bfloat16
    try:
        for indices in tqdm(missing.split(BATCH) if len(missing) else (), desc=f"searching, {BATCH} masks each"):
            tokens = model.encode(pictures.batch(indices), search_steps=steps)
            found[indices.numpy()] = tokens.cpu().numpy()
    finally:
        model.decode_dtype = dtype
        found.flush()
    return torch.from_numpy(np.array(found)).long()
