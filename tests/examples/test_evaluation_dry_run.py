"""The dry run measures what the evaluation command really runs."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "examples" / "evaluation_dry_run.py"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("evaluation_dry_run", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_prints_time_and_memory_of_a_fifth_and_of_all(program, capsys, monkeypatch):
    asked = []
    answers = program.Stub.__call__
    monkeypatch.setattr(program.Stub, "__call__", lambda self, batch: asked.extend(batch) or answers(self, batch))
    program.main(["--samples", "20", "--batch-size", "3", "--metrics", "calibration"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" masks")[0] for line in lines] == ["4", "20"] and len(asked) == 20 + 4 + 20
    for line in lines:
        storing, scoring, intervals, together, peak = map(float, re.findall(r"(\d+(?:\.\d+)?)(?= |,|$)", line)[-5:])
        assert together == pytest.approx(storing + scoring + intervals, abs=0.03) and together > 0 and peak > 50


def test_masks_are_worth_compressing(program):
    masks = [program.blob(np.random.default_rng(seed)) for seed in range(4)]
    assert all(mask.shape == (480, 640) and 0.005 < mask.mean() < 0.5 for mask in masks)
    edges = [np.count_nonzero(mask[1:] != mask[:-1]) for mask in masks]
    assert min(edges) > 100  # ragged, so that the runs of the code are many


def test_too_few_samples(program):
    with pytest.raises(SystemExit, match="at least 5"):
        program.main(["--samples", "4"])
