"""The script of the whole recipe: its options exist, it needs a bank, and it goes on where it was."""

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_tiny.sh"
RECORD = """#!/bin/sh
case "$*" in *"$STOP_AT"*) exit 3;; esac
echo "$*" >> {calls}
"""


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs the script in `folder` with a Python that writes down what it is asked, and fails at `STOP_AT`."""
    recorder = folder / "python"
    recorder.write_text(RECORD.format(calls=folder / "calls"))
    recorder.chmod(0o755)
    environment = {**os.environ, "STOP_AT": "nothing", "PYTHON": str(recorder), **variables}
    command = ["bash", str(SCRIPT)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "sprites.parquet").touch()
    return tmp_path


def test_options_exist(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {"TOKENIZER_STEPS": "30", "MODEL_STEPS": "7", "LISTENING_STEPS": "9", "WHOLE_STEPS": "8"}
    more = {"SCENE_OPTIONS": "--warp 0.18", "MODEL_OPTIONS": "--hidden_size 384"}
    done = run(place, TRAIN_OPTIONS="--use_cpu True --bf16 True", **more, **steps)
    assert done.returncode == 0, done.stderr
    commands = [re.fullmatch(r"-m (\S+) (.*)", line) for line in (place / "calls").read_text().splitlines()]
    assert len(commands) == 6
    for command in commands:
        assert command is not None
        importlib.import_module(command[1]).make_parser().parse_args(shlex.split(command[2]))
    calls = (place / "calls").read_text().splitlines()
    assert "--max_steps 30 --autoencoder_steps 12" in calls[0] and "--max_steps 7" in calls[1]
    assert "--start_from outputs/tiny/model" in calls[2] and "--max_steps 9" in calls[2]
    assert "--start_from outputs/tiny/listening" in calls[3] and "--max_steps 8" in calls[3]
    assert all("--use_cpu True --bf16 True" in call for call in calls[:4])
    assert ["--warp 0.18" in call for call in calls] == [False, True, True, True, False, False]
    assert ["--hidden_size 384" in call for call in calls] == [False, True, False, False, False, False]


def test_a_stopped_run_goes_on(place: Path) -> None:
    assert run(place, STOP_AT="trl_recipes.export").returncode == 3
    first = (place / "calls").read_text().splitlines()
    assert len(first) == 4
    done = run(place)
    assert done.returncode == 0 and "== model is finished" in done.stdout
    calls = (place / "calls").read_text().splitlines()
    assert len(calls) == 6 and "--model outputs/tiny/whole" in calls[4]


def test_without_a_bank(tmp_path: Path) -> None:
    done = run(tmp_path, BANK="nowhere")
    assert done.returncode == 1
    assert "no bank of cut-outs in 'nowhere'" in done.stderr and "make bank BANK=nowhere" in done.stderr
