"""examples/benchmark.py and the two measurements beside it: they run, add up, and compare like with like."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny_scenes
import torch
from PIL import Image

from modeling_argenseg import VARTokenizerConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load(EXAMPLES / "benchmark.py")


@pytest.fixture(scope="module")
def report(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("benchmark") / "figures.json"
    assert benchmark.main(["--quick", "--floors", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_mode_is_there_and_adds_up(benchmark: ModuleType, report: dict) -> None:
    assert list(report["modes"]) == list(benchmark.MODES)
    for name, found in report["modes"].items():
        assert sum(found[part] for part in benchmark.PARTS) == pytest.approx(found["total"])
        assert found["rest"] >= 0 and found["peak_mb"] > 50
        assert found["masks"] == (2 if name.startswith(("images", "prompts")) else 1)
        assert found["per_mask"] == pytest.approx(found["total"] / found["masks"])


def test_both_sides_draw_the_same(report: dict) -> None:
    assert report["ids_that_differ"] == 0


def test_the_parts_are_what_they_are_called(report: dict) -> None:
    modes = report["modes"]
    assert modes["sequential"]["decoder"] == modes["sequential"]["text"] == modes["ours"]["text"] == 0
    assert all(modes["released"][part] > 0 for part in ("vision", "prefill", "text", "scales", "decoder"))
    assert modes["released"]["decoder"] > 2 * modes["ours"]["decoder"]  # five pictures against one
    assert modes["sequential"]["scales"] > 2 * modes["ours"]["scales"]  # 256 passes against 4


def test_the_setup_says_what_was_measured(report: dict) -> None:
    setup = report["setup"]
    assert setup["threads"] >= 1 and setup["torch"] == torch.__version__ and setup["dtype"] == "float32"
    config = json.loads((ROOT / "hub_cards/argenseg-tiny/config.json").read_text())
    text = config["vlm_config"]["text_config"]
    layers, width, rows = text["num_hidden_layers"], text["hidden_size"], text["vocab_size"]
    assert setup["language_model"] == f"{layers} x {width}, vocabulary {rows}"
    assert setup["scales"] == config["visual_tokenizer_config"]["patch_nums"][: config["num_scales"]]
    ours, floors = report["modes"]["ours fast"], report["floors"]
    assert floors["ours fast, ms"] == pytest.approx(1000 * ours["total"])
    reading = floors["weights of the language model's layers, GB"] * 4 + floors["heads read in all, GB"]
    assert floors["reading weights, ms"] == pytest.approx(1000 * reading / floors["copy bandwidth, GB/s"])


@pytest.mark.parametrize("mode", ["ours", "prompts"])
def test_static(benchmark: ModuleType, capsys: pytest.CaptureFixture, mode: str) -> None:
    assert benchmark.main(["--quick", "--static", "--modes", mode]) == 0
    assert "cache: static" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--size", "8b"], "needs a GPU"), (["--count", "0"], "at least 1"), (["--compile"], "needs --static")],
)
def test_mistakes(benchmark: ModuleType, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_sizes_with_random_weights_are_rigged_to_answer(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy of the reference size's kind draws one picture a prompt, the same ids in every way."""
    cases, modes = sys.modules["benchmarks.cases"], sys.modules["benchmarks.modes"]
    small = cases.layers(1, 32, 2, 32, num_key_value_heads=2)
    monkeypatch.setitem(cases.SIZES, "reference", cases.Size(small, cases.layers(1, 32, 2, 32)))
    narrow = partial(VARTokenizerConfig, base_channels=8, norm_num_groups=8)
    monkeypatch.setattr(cases, "VARTokenizerConfig", narrow)
    case = cases.build("reference", "cpu", torch.float32)
    first = modes.released(case, SimpleNamespace(phase=None))
    assert first.shape == (1, 680) and len(first.unique()) > 5
    for options in ({}, {"prompts": 3}, {"prompts": 3, "shared": True}):
        assert torch.equal(modes.ours(case, **options)[:1], first)


@pytest.mark.slow
def test_a_training_step_keeps_a_third(tmp_path: Path) -> None:
    """At the released vocabulary, in processes of its own. Beside one row, what loads along would count too much."""
    script, output = EXAMPLES / "benchmarks" / "training_step.py", tmp_path / "figures.json"
    sizes = ["--width", "32", "--layers", "1", "--rows", "2", "--prompt", "20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *sizes, "--json", str(output)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found = json.loads(output.read_text())
    assert found["parts / plain"] < 1 / 3
    assert found["parts: loss"] == pytest.approx(found["plain: loss"], abs=1e-5)


def test_previews(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    script = load(EXAMPLES / "benchmarks" / "previews.py")
    bank = tiny_scenes.write_bank(tmp_path)
    found = script.main(["--bank", str(bank), "--expressions", "3", "--json", str(tmp_path / "out.json")])
    assert found["asked"] == 3 and [one["scale"] for one in found["scales"]] == ["1x1", "2x2", "4x4", "8x8", "16x16"]
    times = [one["of_time"] for one in found["scales"]]
    assert 0 < times[0] < 1 and times[-1] == 1 and found["scales"][-1]["of_final_iou"] == 1
    assert json.loads((tmp_path / "out.json").read_text()) == found


def test_zoom(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    script = load(EXAMPLES / "benchmarks" / "zoom.py")
    bank, picture, figures = tiny_scenes.write_bank(tmp_path), tmp_path / "changes.png", tmp_path / "out.json"
    files = ["--json", str(figures), "--picture", str(picture)]
    found = script.main(["--bank", str(bank), "--expressions", "6", "--seed", "3", *files])
    assert found["asked"] == 6 >= found["drew"] > 0 and found["seconds"][2] > 1.5 * found["seconds"][0] > 0
    *sizes, whole = found["sizes"]
    assert whole["count"] == sum(one["count"] for one in sizes) == 6 and (whole["above"], whole["up_to"]) == (0, 1)
    for way in range(3):
        assert whole["iou"][way] == pytest.approx(sum(one["count"] * one["iou"][way] for one in sizes) / 6)
    assert len(set(whole["iou"])) == 3 and json.loads(figures.read_text()) == found
    assert Image.open(picture).width > 1000 and "| 0% to 100% of the image | 6 |" in capsys.readouterr().out
