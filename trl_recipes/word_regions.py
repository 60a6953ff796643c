"""Image features that are near the words of what they show: a loss that helps a model trained from scratch to see.

The mask of one request says little about the many things in an image. The scenes know what every cell shows, so each
image token learns, beside the masks, to be nearest to the embedding of its thing's name among all names (and of its
colour among all colours), as in open-vocabulary segmentation. Only the first half of the width is compared, so that
the other half is free for everything else; there is nothing to be kept after training.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .scenes import Scene, SceneBank
from .scenes.lexicon import CONFUSABLE_COLORS

BACKGROUND = "background"
LEAST_SHARE = 0.5  # of a cell that an object must cover to be what the cell shows
MOST_OTHER = 0.02  # of a background cell that may show objects
BACKGROUND_WEIGHT = 0.1  # most cells are background
TEMPERATURE = 0.07
IGNORED = -100


class WordList:
    """The names in a bank, and what each cell of a scene shows.

    Args:
        bank: whose sprites' names are the words; the background is the last of them.
        side: cells in a row, that is image tokens.
    """

    def __init__(self, bank: SceneBank, side: int) -> None:
        self.side = side
        self.nouns = [*sorted({sprite.name for sprite in bank.sprites}), BACKGROUND]
        self.colors = list(CONFUSABLE_COLORS)
        self._noun_index = {word: index for index, word in enumerate(self.nouns)}
        self._color_index = {word: index for index, word in enumerate(self.colors)}

    def of_cells(self, scene: Scene) -> dict[str, np.ndarray]:
        """`nouns` and `colors`, int64 (side * side,), row by row; -100 where a cell shows no one thing."""
        shares = shares_of_cells(scene, self.side)
        nouns, colors = (np.full(self.side**2, IGNORED) for _ in range(2))
        nouns[shares[0] >= 1 - MOST_OTHER] = self._noun_index[BACKGROUND]
        for item in scene.objects:
            shown = shares[item.index] >= LEAST_SHARE
            nouns[shown] = self._noun_index[item.sprite.name]
            if item.sprite.color in self._color_index:
                colors[shown] = self._color_index[item.sprite.color]
        return {"nouns": nouns, "colors": colors}


def shares_of_cells(scene: Scene, side: int) -> np.ndarray:
    """(objects + 1, side * side): how much of each cell shows the background, and each object."""
    height, width = scene.index_map.shape
    cells = scene.index_map.reshape(side, height // side, side, width // side)
    return np.stack([(cells == index).mean((1, 3)).ravel() for index in range(len(scene.objects) + 1)])


class WordRegions(nn.Module):
    """The loss. It has no parameters.

    Args:
        words: the lists that the targets are indices into.
        tokenizer: of the model's text; words are tokenised as they stand inside a sentence.
    """

    def __init__(self, words: WordList, tokenizer: Any) -> None:
        super().__init__()
        for name in ("nouns", "colors"):
            rows = tokenizer([f" {word}" for word in getattr(words, name)], add_special_tokens=False)["input_ids"]
            ids = torch.full((len(rows), max(map(len, rows))), -1)
            for index, row in enumerate(rows):
                ids[index, : len(row)] = torch.tensor(row)
            self.register_buffer(name, ids, persistent=False)
        weight = torch.ones(len(words.nouns))
        weight[-1] = BACKGROUND_WEIGHT
        self.register_buffer("noun_weight", weight, persistent=False)

    def embed(self, ids: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Words (N, l) of token ids, -1 where shorter, to unit vectors (N, hidden / 2): the mean of their tokens."""
        there = (ids >= 0)[..., None]
        vectors = embedding[ids.clamp(min=0), : embedding.shape[1] // 2].float() * there
        return F.normalize(vectors.sum(1) / there.sum(1), dim=-1)

    def forward(
        self, features: torch.Tensor, embedding: torch.Tensor, nouns: torch.Tensor, colors: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy of names plus that of colours, zero where nothing has one.

        Args:
            features: image features (S, cells, hidden).
            embedding: the language model's input embedding (vocabulary, hidden).
            nouns, colors: (S, cells), indices into the words' lists; -100 for none.
        """
        half = F.normalize(features[..., : features.shape[-1] // 2].float(), dim=-1).flatten(0, -2)
        loss = half.sum() * 0.0
        for ids, targets, weight in ((self.nouns, nouns, self.noun_weight), (self.colors, colors, None)):
            with torch.autocast(half.device.type, enabled=False):
                logits = half @ self.embed(ids, embedding).float().T / TEMPERATURE
            part = F.cross_entropy(logits, targets.flatten(), weight=weight, ignore_index=IGNORED, reduction="sum")
            known = targets.flatten().clamp(min=0)
            share = (targets.flatten() != IGNORED) * (1.0 if weight is None else weight[known])
            loss = loss + part / share.sum().clamp(min=1.0)
        return loss


def token_side(image_seq_length: int) -> int:
    """Image tokens in a row.

    Raises:
        ValueError: they are no square.
    """
    side = math.isqrt(image_seq_length)
    if side * side != image_seq_length:
        raise ValueError(f"{image_seq_length} image tokens are no square grid")
    return side
