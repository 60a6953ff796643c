"""Composed scenes: cut-outs on backgrounds with exact masks and unambiguous referring expressions.

bank = SceneBank.from_folder(folder, "train")
dataset = SceneDataset(bank, SceneConfig.preset("full"), seed=0, length=100_000,
                       schedule=[(0, "easy"), (20_000, "medium"), (50_000, "full")])
dataset[0]["image"], dataset[0]["expressions"][0]["mask"]
"""

from .bank import Background, SceneBank, Sprite
from .compose import Scene, SceneObject, compose_scene
from .config import PRESETS, SceneConfig
from .dataset import FlatExpressions, SceneDataset, flat_expressions
from .expressions import KIND_WEIGHTS, Expression, sample_expressions
from .lexicon import Lexicon
from .questions import QUESTION_WEIGHTS, Question, sample_questions

__all__ = [
    "KIND_WEIGHTS",
    "PRESETS",
    "QUESTION_WEIGHTS",
    "Background",
    "Expression",
    "FlatExpressions",
    "Lexicon",
    "Question",
    "Scene",
    "SceneBank",
    "SceneConfig",
    "SceneDataset",
    "SceneObject",
    "Sprite",
    "compose_scene",
    "flat_expressions",
    "sample_expressions",
    "sample_questions",
]
