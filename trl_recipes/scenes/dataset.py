"""Composed scenes as map-style datasets: item i depends on the seed and i alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .bank import SceneBank
from .compose import Scene, compose_scene
from .config import SceneConfig
from .expressions import name_everything, sample_expressions
from .questions import Question, sample_questions
from .view import Expression

_MOST_REDRAWS = 20


class SceneDataset(Dataset):
    """`ds[i]` -> `{"image": PIL RGB, "expressions": [{"text", "kind", "missing", "mask"}, ...], "questions": [...]}`.

    `mask` is a bool array (H, W), all False for the kind "none". Every item has exactly `expressions_per_scene`
    expressions, so that batches are even, and up to `questions_per_scene` questions (`{"text", "answer", "kind",
    "accepted"}`, see `Question`) that are answered in words; they change nothing about scene and expressions.

    Args:
        bank: a split's sprites and backgrounds.
        config: see `SceneConfig`; where a schedule is given, it keeps everything but the number and sizes of objects.
        seed: with the index it determines an item; no other state does, unless a clock shortens the schedule (`hurry`).
        length: number of scenes.
        expressions_per_scene: expressions per scene.
        questions_per_scene: most questions per scene.
        schedule: a curriculum of (first index, preset name) pairs: index i uses the last pair that begins at or
            before i, and `config` as it is before the first pair. Several presets joined by "+" take turns.

    Raises:
        ValueError: the schedule is not in ascending order or names an unknown preset.
    """

    def __init__(
        self,
        bank: SceneBank,
        config: SceneConfig | None = None,
        seed: int = 0,
        length: int = 10_000,
        expressions_per_scene: int = 4,
        schedule: Sequence[tuple[int, str]] = (),
        questions_per_scene: int = 0,
    ) -> None:
        self.bank = bank
        self.config = config or SceneConfig()
        self.seed = seed
        self.length = length
        self.expressions_per_scene = expressions_per_scene
        self.questions_per_scene = questions_per_scene
        self._starts = [int(start) for start, _ in schedule]
        if any(after <= before for before, after in pairwise(self._starts)):
            raise ValueError(f"The schedule's first indices must ascend; got {self._starts}.")
        self._configs = [[self.config.with_preset(one) for one in name.split("+")] for _, name in schedule]
        self._share: torch.Tensor | None = None
        self._total = length

    def hurry(self, share: torch.Tensor, total: int) -> None:
        """Lets a clock shorten the schedule: from now on an item uses at least the pair of index `share * total`, where
        `share` is how much of a run is over when the item is composed: a number in memory that all processes share.
        """
        self._share, self._total = share, total

    def __len__(self) -> int:
        return self.length

    def config_at(self, index: int) -> SceneConfig:
        """The configuration that item `index` is composed with."""
        place = index if self._share is None else max(index, int(self._share * self._total))
        stage = bisect_right(self._starts, place) - 1
        if stage < 0:
            return self.config
        turns = self._configs[stage]
        return turns[index % len(turns)]

    def scene(self, index: int) -> tuple[Scene, list[Expression]]:
        """The scene and its expressions before they become masks.

        Raises:
            IndexError: the index is not in [0, length).
            ValueError: the bank cannot supply `expressions_per_scene` expressions.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"Index {index} is outside a dataset of {self.length} scenes.")
        rng = np.random.default_rng([self.seed, index])
        config = self.config_at(index)
        speak = name_everything if config.only_names else partial(sample_expressions, vocabulary=None)
        for _ in range(_MOST_REDRAWS):
            scene = compose_scene(self.bank, rng, config)
            found = speak(scene, rng=rng, count=self.expressions_per_scene)
            if len(found) == self.expressions_per_scene:
                return scene, found
        raise ValueError(
            f"No scene with {self.expressions_per_scene} different expressions came up in {_MOST_REDRAWS} tries; "
            "lower expressions_per_scene or use a bank with more nouns."
        )

    def questions(self, index: int, scene: Scene) -> list[Question]:
        """The questions about scene `index`."""
        rng = np.random.default_rng([self.seed, index, 1])  # their own: the number of questions changes no scene
        return sample_questions(scene, rng, self.questions_per_scene)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, found = self.scene(index)
        return {
            "image": scene.image,
            "expressions": [_as_item(scene, one) for one in found],
            "questions": [vars(one) for one in self.questions(index, scene)],
        }


class FlatExpressions(Dataset):
    """One expression per item: `{"image", "text", "kind", "missing", "mask", "scene"}`; see `flat_expressions`."""

    def __init__(self, dataset: SceneDataset, count: int) -> None:
        per_scene = dataset.expressions_per_scene
        if count > len(dataset) * per_scene:
            raise ValueError(
                f"{count} expressions need {-(-count // per_scene)} scenes, but the dataset has {len(dataset)}; "
                "give it a larger length."
            )
        self.dataset = dataset
        self.count = count
        self._last: tuple[int, dict[str, Any]] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(f"Index {index} is outside a view of {self.count} expressions.")
        number, place = divmod(index, self.dataset.expressions_per_scene)
        # Neighbouring expressions share a scene: keep the last one instead of composing it again.
        if self._last is None or self._last[0] != number:
            self._last = (number, self.dataset[number])
        item = self._last[1]
        return {"image": item["image"], "scene": number, **item["expressions"][place]}


def flat_expressions(dataset: SceneDataset, count: int) -> FlatExpressions:
    """The dataset's first `count` expressions, one per item, for evaluation.

    Raises:
        ValueError: the dataset has fewer.
    """
    return FlatExpressions(dataset, count)


def _as_item(scene: Scene, one: Expression) -> dict[str, Any]:
    return {"text": one.text, "kind": one.kind, "missing": one.missing, "mask": scene.mask(one.object_ids)}
