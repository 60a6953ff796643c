"""examples/segment.py from the command line: what it writes, what it says, and how it refuses bad input."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "segment.py"
SIZE = (60, 40)  # of the toy photograph
PROMPTS = ["the left square", "the whale", "the ball on the right"]


@pytest.fixture(scope="module")
def segment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("segment_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def done(segment: ModuleType, toy_folder: Path, toy_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with three prompts, in which an earlier run and the user had left things."""
    output = tmp_path_factory.mktemp("outputs")
    for stale in ("mask_1.png", "mask_7.png", "mask_12.png", "mask_of_mine.png", "notes.txt"):
        (output / stale).write_bytes(b"stale")
    assert segment.main([str(toy_image), *PROMPTS, "--model", str(toy_folder), "--output", str(output)]) == 0
    return output


def test_files(done: Path) -> None:
    written = {path.name for path in done.iterdir()}
    assert written == {
        "mask_0.png", "mask_2.png", "overlay.png", "scales.png", "result.json", "mask_of_mine.png", "notes.txt"
    }  # fmt: skip


def test_masks_are_what_the_model_drew(done: Path, toy_folder: Path, toy_masks: list[np.ndarray]) -> None:
    """The model has learned the tokens of the true masks, so the files are what these tokens decode to."""
    processor = AutoProcessor.from_pretrained(toy_folder)
    expected = processor.decode_masks(processor.encode_masks(toy_masks), [SIZE[::-1]] * 2)[1]
    for index, mask in ((0, expected[0]), (2, expected[1])):
        picture = Image.open(done / f"mask_{index}.png")
        assert (picture.mode, picture.size) == ("L", SIZE)
        np.testing.assert_array_equal(np.asarray(picture), mask * 255)


def test_result(done: Path, toy_folder: Path, toy_image: Path) -> None:
    result = json.loads((done / "result.json").read_text())
    assert result["model"] == str(toy_folder)
    assert result["image"] == str(toy_image)
    assert (result["width"], result["height"]) == SIZE
    square, whale, ball = result["prompts"]
    assert [one["prompt"] for one in result["prompts"]] == PROMPTS
    assert square["answer"].startswith("Sure") and whale["answer"] == "There is no whale."
    assert square["drawn"] and ball["drawn"] and not whale["drawn"]
    assert whale["score"] is whale["file"] is whale["area"] is None
    assert square["file"] == "mask_0.png" and ball["file"] == "mask_2.png"
    for one in (square, ball):
        white = np.asarray(Image.open(done / one["file"])) > 0
        assert one["area"] == pytest.approx(white.mean(), abs=1e-4)
        assert 0.5 < one["score"] <= 1
    assert all(one["seconds"] > 0 for one in result["prompts"])


def test_overlay_shows_photograph_and_legend(done: Path) -> None:
    overlay = Image.open(done / "overlay.png")
    assert overlay.width == 480  # the small photograph is enlarged
    assert overlay.height > 320
    assert overlay.getpixel((479, overlay.height - 1)) == (255, 255, 255)


def test_scales_has_a_row_for_each_mask(done: Path, segment: ModuleType) -> None:
    sheet = Image.open(done / "scales.png")
    assert sheet.width == 16 + 5 * (segment.TILE + 16)  # the photograph and four scales
    assert sheet.height == 16 + 2 * (112 + 64)


def test_nothing_drawn_leaves_no_masks(
    segment: ModuleType, toy_folder: Path, toy_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scales.png").write_bytes(b"stale")
    arguments = [str(toy_image), "the whale", "--model", str(toy_folder), "--output", str(tmp_path)]
    assert segment.main([*arguments, "--dtype", "float32", "--max-new-tokens", "30"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"overlay.png", "result.json"}
    said = capsys.readouterr()
    assert "There is no whale." in said.out and "none drawn" in said.out
    assert "loading" in said.err and "loading" not in said.out


def test_bfloat16(segment: ModuleType, toy_folder: Path, toy_image: Path, tmp_path: Path) -> None:
    arguments = [str(toy_image), "the left square", "--model", str(toy_folder), "--output", str(tmp_path)]
    assert segment.main([*arguments, "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["prompts"][0]["drawn"]


def test_zoom(segment: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the default model: views are cut from the photograph, and what it draws of them is another mask."""
    masks = []
    for options in ([], ["--zoom"]):
        assert segment.main([str(ROOT / "examples/sheep.jpg"), "the sheep", "--output", str(tmp_path), *options]) == 0
        masks.append(np.asarray(Image.open(tmp_path / "mask_0.png")) > 0)
        assert (tmp_path / "scales.png").exists() and "the sheep" in capsys.readouterr().out
    assert 0.8 < (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum() < 1


def test_edges(segment: ModuleType, tmp_path: Path) -> None:
    masks = []
    for options in ([], ["--follow-edges"], ["--no-follow-edges"], ["--zoom"], ["--zoom", "--no-follow-edges"]):
        assert segment.main([str(ROOT / "examples/sheep.jpg"), "the sheep", "--output", str(tmp_path), *options]) == 0
        masks.append(np.asarray(Image.open(tmp_path / "mask_0.png")) > 0)
    default, edges, plain, zoomed, zoomed_plain = masks
    assert (default == edges).all() and (edges != plain).any() and (zoomed != zoomed_plain).any()


def test_answer_cut_short(segment: ModuleType, toy_folder: Path, toy_image: Path, tmp_path: Path) -> None:
    arguments = [str(toy_image), "the left square", "--model", str(toy_folder), "--output", str(tmp_path)]
    assert segment.main([*arguments, "--max-new-tokens", "1"]) == 0
    assert not json.loads((tmp_path / "result.json").read_text())["prompts"][0]["drawn"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg", "a cat"], "nowhere.jpg"),
        ([str(SCRIPT), "a cat"], "segment.py"),
        ([str(ROOT), "a cat"], "directory"),
        (["IMAGE", "a cat", "  "], "prompt 1 is empty"),
        (["IMAGE", "a cat", "--max-new-tokens", "0"], "at least 1"),
        (["IMAGE", "a cat", "--model", "no_such_folder"], "no model folder 'no_such_folder'"),
        (["IMAGE", "a cat", "--model", "hub_cards/no-such-model"], "no model folder 'hub_cards/no-such-model'"),
        (["IMAGE", "a cat", "--model", "EMPTY"], "cannot load a model"),
        (["IMAGE", "a cat", "--model", "MODEL", "--device", "toaster"], "toaster"),
        (["IMAGE", "a cat", "--model", "MODEL", "--output", str(SCRIPT)], "cannot write"),
        (["IMAGE", "cat " * 500, "--model", "MODEL", "--output", "EMPTY"], "context"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    segment: ModuleType,
    toy_folder: Path,
    toy_image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"IMAGE": str(toy_image), "MODEL": str(toy_folder), "EMPTY": str(tmp_path)}
    assert segment.main([names.get(one, one) for one in arguments]) == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert said.err.splitlines()[-1] == errors[0] and said.out == ""


def test_as_a_program(toy_folder: Path, toy_image: Path, tmp_path: Path) -> None:
    """In a process of its own, from another folder: the exit code and streams that a shell sees."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(toy_image), PROMPTS[0], "--model", str(toy_folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "mask_0.png").is_file()
    assert done.stdout.splitlines()[0] == f"[0] {PROMPTS[0]}"
    assert "loading" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (2, 700), (2500, 1700)])
def test_any_size_of_image(size: tuple[int, int], segment: ModuleType) -> None:
    image = Image.new("RGB", size, "green")
    mask = np.zeros(size[::-1], dtype=bool)
    mask[: max(1, size[1] // 2)] = True
    maps = torch.rand(3, 16, 16).numpy()
    long = segment.Answer("word " * 60 + "x" * 400, "", mask, 0.5, 0.1, maps)
    none = segment.Answer("Bär", "There is no bear.", None, None, 0.1, None)
    empty = segment.Answer("a void", "", np.zeros_like(mask), None, 0.1, maps)
    shown = segment.overlay(image, [long, none, empty] * 4)
    assert 480 <= shown.width <= 1600
    assert segment.scales(image, [long, none, empty], [1, 2, 4]).width >= 16 + 4 * 96


def test_wrap(segment: ModuleType) -> None:
    font = segment.ImageFont.load_default(size=16)
    lines = segment.wrap("the quick brown fox " + "x" * 80 + " jumps over", font, 120)
    assert len(lines) == 3 and lines[0] == "the quick brown" and lines[-1].endswith("...")
    assert all(font.getlength(line) <= 130 for line in lines)
    assert segment.wrap("short", font, 120) == ["short"]


def test_help_teaches(segment: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        segment.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "mask_<i>.png" in text and "Exit code 2" in text
