"""examples/benchmarks/gpu.py: all of it runs without a GPU, in time, and a failure does not end it."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from modeling_argenseg import VARTokenizerConfig, static_steps

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a toy in place of the reference size."""
    spec = importlib.util.spec_from_file_location("gpu_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    cases = sys.modules["benchmarks.cases"]
    small = cases.layers(1, 32, 2, 32, num_key_value_heads=1)
    monkeypatch.setitem(cases.SIZES, "reference", cases.Size(small, cases.layers(1, 32, 2, 32)))
    narrow = partial(VARTokenizerConfig, base_channels=8, norm_num_groups=8)
    monkeypatch.setattr(cases, "VARTokenizerConfig", narrow)
    monkeypatch.setattr(sys.modules["benchmarks.modes"], "SEQUENTIAL_STEPS", 4)
    monkeypatch.setattr(script, "START", script.time.perf_counter())
    cheap = partial(torch.compile, backend="eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(static_steps, "compile_bitwise", cheap)
    return script


def figures(gpu: ModuleType, folder: Path, *more: str) -> dict:
    path = folder / "figures.json"
    options = ["--device", "cpu", "--size", "reference", "--dtype", "float32", "--count", "2", "--json", str(path)]
    assert gpu.main([*options, *more]) == 0
    return json.loads(path.read_text())


def test_all_steps_run(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    steps = gpu.Measurement(gpu.Report(None, 1), gpu.make_parser().parse_args([])).steps()
    found = figures(gpu, tmp_path, "--only", *[name for name in steps if not name.startswith("tiny")])
    assert not [name for name in found if name.startswith(("failed", "skipped"))]
    assert found["recorded passes, and refused"] == [9, 0]  # of the last: two rows, images and prompts alike
    differ = {name: value for name, value in found.items() if "ids that" in name and "same" not in name}
    assert len(differ) == 10 and set(differ.values()) == {0}
    assert found["compiled layers, and whether all could be"] == [9, True]
    rows = {row[0]: row[1:] for row in found["recorded: floor, with vision, prefill and decoder as they run"][1:]}
    assert rows["vision"][0] == rows["vision"][1] and rows["vision"][2] == 1
    parts = [rows[part] for part in gpu.PARTS]
    assert rows["total"][0] == pytest.approx(sum(part[0] for part in parts))
    assert rows["total"][1] == pytest.approx(sum(part[1] for part in parts) + rows["rest"][1])
    assert found["2 prompts, recorded: masks/s"] == pytest.approx(2000 / found["2 prompts, recorded: ms"])
    assert "| total |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_small_model(gpu: ModuleType, tmp_path: Path) -> None:
    found = figures(gpu, tmp_path, "--only", "tiny", "tiny compiled")
    differ = [value for name, value in found.items() if name.startswith("tiny") and "ids that" in name]
    assert differ == [0] * 4 and found["tiny, recorded: ms a mask"] > 0


def test_what_does_not_fit_is_skipped(gpu: ModuleType, tmp_path: Path) -> None:
    report = gpu.Report(tmp_path / "figures.json", seconds=1)
    report.step("long", 100, lambda: report.add("ran", True))
    assert list(json.loads((tmp_path / "figures.json").read_text())) == ["skipped: long"]


def test_time_is_up_while_a_step_runs(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    left: list[int] = []
    monkeypatch.setattr(gpu.os, "_exit", left.append)
    monkeypatch.setattr(gpu.Measurement, "build", lambda self: gpu.time.sleep(0.5))
    figures(gpu, tmp_path, "--seconds", "0.2", "--only", "build")
    assert left == [0] and "time is up" in capsys.readouterr().out


def test_failures_are_reported(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: out of patience")

    monkeypatch.setattr(gpu.modes, "released", fails)
    found = figures(gpu, tmp_path, "--only", "released", "plain")
    assert found["failed: released"] == "RuntimeError: CUDA error: out of patience" and found["done"]
    assert found["one prompt, plain: ms, median of 3"] > 0 and "recorded passes, and refused" not in found
