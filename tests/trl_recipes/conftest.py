"""What the recipes' tests share: a bank, a visual tokenizer, and a model that has learned one scene."""

from pathlib import Path

import pytest
import tiny_scenes
import torch

from trl_recipes import train_scenes
from trl_recipes.scene_samples import SceneSamples

Factory = pytest.TempPathFactory


@pytest.fixture(scope="session")
def bank_folder(tmp_path_factory: Factory) -> Path:
    return tiny_scenes.write_bank(tmp_path_factory.mktemp("bank"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: Factory) -> Path:
    folder = tmp_path_factory.mktemp("grey_tokenizer")
    tiny_scenes.grey_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def learned_folder(bank_folder: Path, tokenizer_folder: Path, tmp_path_factory: Factory) -> Path:
    """What `train_scenes --overfit 4` leaves behind: a model that knows the four requests of one scene."""
    folder = tmp_path_factory.mktemp("learned")
    recipe = tiny_scenes.scene_arguments(bank_folder, tokenizer_folder, overfit=4, schedule=["easy"])
    training = tiny_scenes.training_arguments(
        folder,
        seed=tiny_scenes.SEED,
        max_steps=160,
        learning_rate=8e-3,
        save_strategy="steps",
        eval_strategy="steps",
        eval_steps=160,
    )
    train_scenes.main(recipe, training)
    return folder


@pytest.fixture(scope="session")
def known_scenes(bank_folder: Path):
    """The scenes of that run; it has learned the first. Its requests: two masks, an egg that is not there, a mask."""
    return tiny_scenes.scenes(bank_folder)


@pytest.fixture(scope="module")
def parts(bank_folder, tokenizer_folder, known_scenes):
    """Model and processor as the recipe builds them, with all scales."""
    torch.manual_seed(0)
    recipe = tiny_scenes.scene_arguments(bank_folder, tokenizer_folder, num_scales=None)
    model, processor = train_scenes.load_or_build(recipe, known_scenes)
    return model.train(), processor


@pytest.fixture(scope="module")
def samples(parts, known_scenes):
    return SceneSamples(known_scenes, parts[1])
