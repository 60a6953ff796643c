"""Shared by all tests: one thread (the models are tiny), quiet logs, and a toy model that really draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model of toy.py and its processor, trained and saved like any other."""
    import toy

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("toy")
    model, processor = toy.build()
    toy.learn(model, toy.lessons(processor))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photograph that the toy model knows."""
    import toy

    path = tmp_path_factory.mktemp("images") / "toy.png"
    toy.photograph().save(path)
    return path


@pytest.fixture
def toy_masks() -> list[np.ndarray]:
    """The true masks of the first and second request, (40, 60) bool."""
    import toy

    return toy.true_masks()
