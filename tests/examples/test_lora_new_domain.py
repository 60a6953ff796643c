"""The drawn data set is the same every time and can be read; the example runs; its page holds what it says."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from processing.mask_inputs import load_mask
from trl_recipes import lora
from trl_recipes.mask_data import load_mask_data

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/lora_new_domain"
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
MODEL = ROOT / "hub_cards/argenseg-tiny"
needs_model = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="needs hub_cards/argenseg-tiny")


@pytest.fixture(scope="module")
def example():
    """The two scripts, as they are when one of them is run."""
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in ("draw_domain", "run")}
    sys.path.remove(str(FOLDER))
    for name in ("draw_domain", "run"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def land(example, tmp_path_factory) -> Path:
    return example["draw_domain"].write_domain(tmp_path_factory.mktemp("land"), train=6, validation=3)


def test_the_data_set_can_be_read(land):
    train, validation = (load_mask_data(land, split, progress=False) for split in ("train", "validation"))
    assert len(set(train["image_id"])) == len(train) == 6 and len(set(validation["image_id"])) == len(validation) == 3
    for row in [*train, *validation]:
        assert row["prompt"] == "the lake" and row["image"].size == (256, 256)
        for mask in row["masks"]:  # blue is most of all what is asked for
            area, pixels = load_mask(mask), np.asarray(row["image"], dtype=float)
            assert 0.01 <= area.mean() < 0.5
            assert (pixels[area].mean(0).argmax(), pixels[~area].mean(0).argmax() == 2) == (2, False)


def test_now_and_then_there_is_no_lake(example):
    found = ["lake" in example["draw_domain"].draw_land(seed)[1] for seed in range(64)]
    assert 0.75 < np.mean(found) < 0.97


def test_pictures_do_not_change(example, land, tmp_path):
    again = example["draw_domain"].write_domain(tmp_path, train=6, validation=3)
    for path in land.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(land)).read_bytes()
    other = example["draw_domain"].draw_land(1)[0]
    assert example["draw_domain"].draw_land(0)[0].tobytes() != other.tobytes()


def test_things_look_different(example):
    """The mean colours of the surfaces: a model that sees colours can tell them apart."""
    surface, things = example["draw_domain"].surface, list(example["draw_domain"].THINGS)
    means = np.array([surface(np.random.default_rng(0), thing).mean((0, 1)) for thing in things])
    distance = np.linalg.norm(means[:, None] - means[None], axis=-1)
    assert distance[~np.eye(len(things), dtype=bool)].min() > 20


@needs_model
def test_the_example_runs_and_writes_its_results(example, tmp_path):
    words = ["--model", str(MODEL), "--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    words += ["--train", "2", "--validation", "1", "--"]
    words += ["--max_steps", "2", "--per_device_train_batch_size", "1", "--eval_steps", "2", "--save_steps", "2"]
    words += ["--disable_tqdm", "True", "--use_cpu", "--cache_dir", str(tmp_path / "cache")]
    told = example["run"].main(words)
    result = json.loads((tmp_path / "results/result.json").read_text())
    assert result == told and result["minutes"]["wall"] >= 0
    measured = {entry["step"]: entry for entry in lora.read_metrics(tmp_path / "out")}
    assert result["before"] == measured[0] and result["after"] == measured[2]
    assert result["giou_lift"] == pytest.approx(measured[2]["giou"] - measured[0]["giou"], abs=1e-4)
    assert 0 < result["best_constant_giou"] < 1
    for name in ("learning_curve", "before_after"):
        assert min(Image.open(tmp_path / f"results/{name}.png").size) > 100
    assert (tmp_path / "out/merged/config.json").is_file()


def test_before_and_after_stand_side_by_side(example, tmp_path):
    from trl_recipes.picture_grid import GAP, SIDE, picture_grid

    image, mask = Image.new("RGB", (64, 64), (200, 200, 200)), np.zeros((64, 64), bool)
    picture_grid([(image, "the lake", mask, mask, "before")] * 2).save(tmp_path / "a.png")
    picture_grid([(image, "the lake", mask, ~mask, "after")] * 2).save(tmp_path / "b.png")
    sheet = np.asarray(example["run"].before_and_after(tmp_path / "a.png", tmp_path / "b.png", lines=2))
    colours = [sheet[20 + SIDE // 2, place * (SIDE + GAP) + SIDE // 2].tolist() for place in range(4)]
    assert colours[0] == [200, 200, 200] and colours[1] == colours[2] and colours[3][0] > colours[2][0] + 20


COMMANDS = re.findall(r"^python (?:-m )?(\S+) (.*?)(?: +#.*)?$", TEXT.replace("\\\n", ""), flags=re.MULTILINE)


@pytest.mark.parametrize(("program", "arguments"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_commands_of_the_page_parse(example, program, arguments):
    if program.endswith(".py"):
        assert (ROOT / program).is_file()
        parser = example[Path(program).stem].make_parser()
    else:
        parser = importlib.import_module(program).make_parser()
    parser.parse_args(shlex.split(arguments))


def test_the_page_has_the_commands_that_the_example_runs(example):
    (words,) = [shlex.split(arguments) for program, arguments in COMMANDS if program == "trl_recipes.lora"]
    recipe = example["run"].RECIPE
    given = {words[i].removeprefix("--"): words[i + 1] for i in range(0, len(words), 2)}
    assert all(type(value)(given[name]) == value for name, value in recipe.items() if name in given)
    assert {"max_steps", "learning_rate", "eval_steps"} <= given.keys()


@needs_model
def test_python_of_the_page_runs(land, tmp_path, monkeypatch):
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    exec(compile(block, "README.md", "exec"), {"MODEL": MODEL, "DATA": land, "OUTPUT": str(tmp_path), "STEPS": 1})
    merged = tmp_path / "merged"
    assert (merged / "model.safetensors").is_file() and (merged / "visual_tokenizer/config.json").is_file()
