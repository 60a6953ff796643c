"""TRL's trainer on one's own masks: the loss is the model's, what should train does, and nothing else moves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import own_masks
import pytest
import tiny
import torch
import yaml
from adapted import check_what_moved
from own_masks import STEPS, trl_command
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments
from trl import SFTTrainer

from trl_recipes import publish, sft
from trl_recipes.export import export
from trl_recipes.lora import read_metrics, report


def prepared(arguments: list[str]) -> sft.MaskSFTTrainer:
    return sft.prepare(*sft.make_parser().parse_args_and_config(arguments))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return own_masks.as_jsonl(tmp_path_factory.mktemp("data") / "own")


@pytest.fixture(scope="module")
def full(toy_folder, data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("full") / "out"
    sft.main(trl_command("sft_full", toy_folder, data, output))
    return output


@pytest.fixture(scope="module")
def with_adapters(toy_folder, data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("lora") / "out"
    sft.main(trl_command("sft_lora", toy_folder, data, output, learning_rate=3e-2))
    return output


def states(before: Path, after: Path) -> tuple[dict, dict]:
    return tuple(AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (before, after))


def check_learned(output: Path) -> None:
    """The loss fell, and the requests are answered as the data say: with a mask, or with words."""
    logged = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    losses = [entry for entry in logged if "loss" in entry]
    assert len(losses) == STEPS
    for name in ("loss", "visual_loss"):
        assert losses[-1][name] < 0.1 * losses[0][name], name
    measured = read_metrics(output)
    assert [entry["step"] for entry in measured] == [0, STEPS]
    assert measured[-1]["n_acc"] == measured[-1]["t_acc"] == 1


def test_full_training_learns_the_new_masks(full):
    check_learned(full)
    for name in ("check_masks.png", "learning_curve.png", f"drawn-{STEPS:06d}.png", "visual_tokenizer/config.json"):
        assert (full / name).is_file()
    assert not (full / "README.md").exists()  # TRL's would say that this is a model for text


def test_full_training_moves_all_but_the_vision_tower_and_the_codebook(full, toy_folder):
    before, after = states(toy_folder, full)
    assert before.keys() == after.keys()
    frozen = [name for name in before if ".vision_tower." in name or ".quantizer." in name]
    assert len(frozen) > 10
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in frozen), name
    old, new = (load_file(folder / "visual_tokenizer/model.safetensors") for folder in (toy_folder, full))
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_the_vision_tower_trains_when_asked_to(toy_folder, data, tmp_path):
    trainer = prepared(trl_command("sft_full", toy_folder, data, tmp_path / "out", train_vision_tower=True))
    assert all(p.requires_grad for p in trainer.model.model.vlm.vision_tower.parameters())
    assert not any(p.requires_grad for p in trainer.model.model.quantizer.parameters())


def test_adapters_learn_the_new_masks_and_move_nothing_else(with_adapters, toy_folder):
    check_learned(with_adapters)
    merged = AutoModelForImageTextToText.from_pretrained(with_adapters / "merged")
    check_what_moved(AutoModelForImageTextToText.from_pretrained(toy_folder).state_dict(), merged, new_parts=False)
    assert (with_adapters / "adapter_model.safetensors").is_file()


@pytest.fixture
def fresh_folder(toy_folder, tmp_path) -> Path:
    """A model whose drawing parts have never been trained, as `from_vlm` makes it."""
    shutil.copytree(toy_folder, tmp_path / "fresh")
    model = AutoModelForImageTextToText.from_pretrained(toy_folder)
    for part in (model.model.generation_projector, model.model.scale_embedding, model.model.position_embedding):
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path / "fresh")
    return tmp_path / "fresh"


def test_new_token_rows_train_beside_the_adapters(fresh_folder, data, tmp_path):
    quick = {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no"}
    sft.main(trl_command("sft_lora", fresh_folder, data, tmp_path / "out", **quick))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "merged")
    check_what_moved(AutoModelForImageTextToText.from_pretrained(fresh_folder).state_dict(), merged, new_parts=True)


def test_adapters_on_weights_in_half_precision_are_in_single(fresh_folder, data, tmp_path):
    """TRL makes bf16 of them where the weights are quantised."""
    quick = {"max_steps": 2, "eval_steps": 2, "save_strategy": "no", "dtype": "bfloat16"}
    trainer = prepared(trl_command("sft_lora", fresh_folder, data, tmp_path / "out", **quick))
    trainer.model.to(torch.bfloat16)
    sft.restore_dtypes(trainer.model)
    trained = {name: one.dtype for name, one in trainer.model.named_parameters() if one.requires_grad}
    for part in ("lora_", "token_adapter"):
        assert {dtype for name, dtype in trained.items() if part in name} == {torch.float32}
    assert {dtype for name, dtype in trained.items() if "modules_to_save" in name} == {torch.bfloat16}
    folder = sft.train(trainer)
    assert AutoModelForImageTextToText.from_pretrained(folder).dtype == torch.bfloat16


def test_adapters_can_be_loaded_made_whole_and_not_gone_on_from(with_adapters, toy_folder, data, tmp_path, monkeypatch):
    """What training on quantised weights leaves: adapters and a processor in one folder."""
    monkeypatch.chdir(tmp_path)  # and they know their base from everywhere
    processor = AutoProcessor.from_pretrained(with_adapters)
    assert processor.visual_tokenizer is not None
    merged = AutoModelForImageTextToText.from_pretrained(with_adapters / "merged")
    whole = AutoModelForImageTextToText.from_pretrained(export(with_adapters, tmp_path / "whole"))
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], tensor, atol=1e-3, rtol=1e-3, msg=name)
    bare = shutil.copytree(
        with_adapters, tmp_path / "bare", ignore=shutil.ignore_patterns("processor*", "merged", "check*")
    )
    again = AutoModelForImageTextToText.from_pretrained(export(bare, tmp_path / "again"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    config = json.loads((bare / "adapter_config.json").read_text())
    for base, message in ((None, "does not say what model"), ("gone", "the model that the adapters are of, gone")):
        (bare / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=message):
            export(bare, tmp_path / "none")
    with pytest.raises(SystemExit, match="adapters alone; first make a whole model of them"):
        sft.main(trl_command("sft_full", with_adapters, data, tmp_path / "out"))
    with pytest.raises(ValueError, match="adapters alone; first make a whole model of them"):
        publish.inspect(with_adapters, "model")


def test_adapters_on_quantised_weights_are_left_as_they_are(toy_folder, data, tmp_path, capsys):
    quick = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    trainer = prepared(trl_command("sft_lora", toy_folder, data, tmp_path / "out", **quick))
    trainer.model.get_base_model().is_quantized = True
    trainer.model.get_base_model().generation_config.picture_logit_adjustment = 0.7
    folder = sft.train(trainer)
    report(trainer, folder)
    whole = AutoModelForImageTextToText.from_pretrained(export(folder, tmp_path / "whole"))
    assert whole.generation_config.picture_logit_adjustment == 0.7
    assert folder == tmp_path / "out" and not (folder / "merged").exists()
    assert f"python -m trl_recipes.export --model {folder} --output {folder}-whole" in capsys.readouterr().out


def test_a_folder_of_quantised_weights_says_itself_how_it_is_loaded(toy_folder, data, tmp_path, monkeypatch):
    folder = shutil.copytree(toy_folder, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    seen = {}

    def from_pretrained(name, **options):
        seen.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(sft.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    with pytest.raises(SystemExit, match="enough"):
        sft.main(trl_command("sft_lora", folder, data, tmp_path / "out"))
    assert seen["dtype"] == "auto" and "quantization_config" not in seen
    with pytest.raises(ValueError, match="the weights of .*packed are quantised: take the model"):
        export(folder, tmp_path / "whole")


@pytest.mark.parametrize("config", ["sft_full", "sft_lora"])
def test_the_loss_is_the_models_own(config, toy_folder, data, tmp_path):
    trainer = prepared(trl_command(config, toy_folder, data, tmp_path / "out"))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    model = AutoModelForImageTextToText.from_pretrained(toy_folder)
    assert int(model.config.is_visual(batch["labels"]).sum()) == 4 * tiny.T  # the visual tokens are in the batch
    expected = {}
    for weight in (1.0, 0.25):
        model.config.visual_loss_weight = weight
        base = trainer.model if config == "sft_full" else trainer.model.get_base_model()
        base.config.visual_loss_weight = weight
        with torch.no_grad():
            expected[weight] = model(**batch).loss
            found = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(7))
        torch.testing.assert_close(found, expected[weight], rtol=1e-4, atol=1e-5)
    assert abs(expected[1.0] - expected[0.25]) > 1e-3
    with torch.no_grad():
        theirs = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch))
    assert abs(theirs - expected[0.25]) > 1e-3  # TRL's own would be another


SPLITS = [(6, 1), (2, 3), (1, 6)]


def test_the_parts_of_the_loss_are_those_of_groups_of_unlike_length(toy_folder, data, tmp_path):
    """Six rows, four at a time: every second step has but two."""
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2, "logging_steps": 2}
    quick = {"eval_strategy": "no", "save_strategy": "no"}
    trainer = prepared(trl_command("sft_full", toy_folder, data, tmp_path, **options, **quick))
    trainer.train()
    found = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    weight = trainer.model.config.visual_loss_weight
    assert found["text_loss"] + weight * found["visual_loss"] == pytest.approx(found["loss"], rel=2e-4)


@pytest.mark.parametrize("config", ["sft_full", "sft_lora"])
def test_a_step_is_the_same_however_its_rows_are_split(config, toy_folder, data, tmp_path):
    """Some of the small batches draw nothing, and their answers are of other lengths."""
    first = {}
    for rows, batches in SPLITS:
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batches, "max_steps": 1}
        quick = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}
        trainer = prepared(trl_command(config, toy_folder, data, tmp_path / f"{rows}", **options, **quick))
        trainer.train()
        first[rows] = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
        weight = trainer.accelerator.unwrap_model(trainer.model).config.visual_loss_weight
        parts = first[rows]["text_loss"] + weight * first[rows]["visual_loss"]
        assert parts == pytest.approx(first[rows]["loss"], rel=1e-3)
    for entry in first.values():
        for name in ("loss", "grad_norm", "text_loss", "visual_loss"):
            assert entry[name] == pytest.approx(first[6][name], rel=1e-3), name


def test_the_parts_of_the_loss_are_means_over_the_steps_since_they_were_logged(toy_folder, data, tmp_path):
    logged = {}
    for every in (1, 3):
        options = {"max_steps": 3, "logging_steps": every, "eval_strategy": "no", "save_strategy": "no"}
        trainer = prepared(trl_command("sft_full", toy_folder, data, tmp_path / f"{every}", **options))
        trainer.train()
        logged[every] = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    for name in ("loss", "text_loss", "visual_loss"):
        mean = sum(entry[name] for entry in logged[1]) / 3
        assert logged[3][0][name] == pytest.approx(mean, rel=1e-3)


def test_several_gpus_for_one_process_are_refused(toy_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(SystemExit, match="sees 2 GPUs.*--num_processes 2.*CUDA_VISIBLE_DEVICES=0"):
        sft.main(trl_command("sft_full", toy_folder, data, tmp_path / "out"))


def test_only_the_first_of_several_processes_writes_the_learning_curve(toy_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sft.MaskSFTTrainer, "is_world_process_zero", lambda self: False)
    trainer = prepared(trl_command("sft_full", toy_folder, data, tmp_path, max_steps=1, eval_strategy="no"))
    sft.train(trainer)
    assert not (tmp_path / "learning_curve.png").exists()


def test_a_stopped_run_goes_on(full, toy_folder, data, tmp_path):
    shutil.copytree(full / f"checkpoint-{STEPS // 2}", tmp_path / f"checkpoint-{STEPS // 2}")
    sft.main(trl_command("sft_full", toy_folder, data, tmp_path))
    expected, found = states(full, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_finished_run_stays_as_it_is(full, toy_folder, data, tmp_path, capsys):
    shutil.copytree(full, tmp_path / "run")
    sft.main(trl_command("sft_full", toy_folder, data, tmp_path / "run"))
    assert f"the run is finished at step {STEPS}" in capsys.readouterr().out
    expected, found = states(full, tmp_path / "run")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.01 and is now 0.001"),
        ({"train_vision_tower": True}, "train_vision_tower was False and is now True"),
        ({"use_peft": True}, "use_peft was False and is now True"),
        ({"search_steps": 6}, "training_data was"),
    ],
)
def test_an_output_of_other_options_is_refused(full, toy_folder, data, changes, message):
    with pytest.raises(SystemExit, match=rf"holds a run with other settings: .*{message}.*--output, or --overwrite"):
        sft.main(trl_command("sft_full", toy_folder, data, full, **changes))


def test_so_is_one_of_other_adapters_or_weights(with_adapters, full, toy_folder, data):
    changes = dict(learning_rate=3e-2, lora_r=4, lora_target_modules="q_proj")
    with pytest.raises(SystemExit, match=r"lora\.r was 16 and is now 4; lora\.target_modules .* now 'q_proj'"):
        sft.main(trl_command("sft_lora", toy_folder, data, with_adapters, **changes))
    with pytest.raises(SystemExit, match="weights was"):
        sft.main(trl_command("sft_full", full, data, full))


def test_it_may_be_overwritten_but_not_the_model_to_begin_with(full, toy_folder, data, tmp_path):
    output = shutil.copytree(full, tmp_path / "run")
    for model in (output, output / f"checkpoint-{STEPS}"):
        with pytest.raises(SystemExit, match="--overwrite would delete .* of the model to begin with"):
            sft.main(trl_command("sft_full", model, data, output, overwrite=True))
    (output / "mine.txt").touch()
    changes = dict(overwrite=True, max_steps=1, eval_steps=1, save_steps=1)
    sft.main(trl_command("sft_lora", toy_folder, data, output, **changes))
    assert [entry["step"] for entry in read_metrics(output)] == [0, 1] and (output / "mine.txt").is_file()
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (output / "adapter_model.safetensors").is_file() and not (output / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["sft_full", "sft_from_vlm", "sft_lora"])
def test_the_configurations_are_read_and_the_command_line_goes_before_them(name, tmp_path):
    path = own_masks.CONFIGS / f"{name}.yaml"
    words = ["--config", str(path), "--data", "d", "--output_dir", str(tmp_path), "--max_steps", "7"]
    recipe, training, model_args = sft.make_parser().parse_args_and_config(words)
    written = yaml.safe_load(path.read_text())
    assert training.max_steps == 7 and recipe.data == "d"
    assert training.learning_rate == written["learning_rate"]
    assert model_args.use_peft == (name == "sft_lora") and not training.bf16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True}, "--packing does not go with"),
        ({"padding_free": True}, "--padding_free"),
        ({"max_length": 99}, "--max_length would cut pictures"),
        ({"loss_type": "dft"}, "--loss_type would change nothing: the loss is the model's own"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor would change nothing"),
        ({"completion_only_loss": False}, "--completion_only_loss would change nothing"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere is no whole checkpoint"),
    ],
)
def test_bad_options_are_told_before_anything_is_trained(changes, message, toy_folder, data, tmp_path):
    with pytest.raises(SystemExit, match=message):
        sft.main(trl_command("sft_full", toy_folder, data, tmp_path / "out", **changes))


MISSING_TRL = """
import runpy, sys
class NotInstalled:
    def find_spec(self, name, *args):
        if name == "trl":
            raise ModuleNotFoundError("No module named 'trl'", name="trl")
sys.meta_path.insert(0, NotInstalled())
"""


@pytest.mark.parametrize(
    ("started", "kind"),
    [('runpy.run_module("trl_recipes.sft", run_name="__main__")', "error"), ("import trl_recipes.sft", "ImportError")],
)
def test_a_missing_trl_is_told_with_the_way_to_install_it(started, kind):
    words = [sys.executable, "-c", MISSING_TRL + started]
    done = subprocess.run(words, cwd=own_masks.CONFIGS.parents[1], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"{kind}: No module named 'trl': pip install 'argenseg[train]'"
    assert ("Traceback" in done.stderr) == (kind == "ImportError")  # the command says it in a line


def test_a_model_must_be_named(data, tmp_path):
    words = ["--data", str(data), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    with pytest.raises(SystemExit, match="--model_name_or_path"):
        sft.main(words)
