"""LoRA on one's own masks: the command learns, writes what it promises, moves nothing else, and survives a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import own_masks
import pytest
import tiny_scenes
import torch
import toy
from adapted import check_what_moved
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, pipeline

from trl_recipes import lora
from trl_recipes.adapters import add_adapters, lora_config
from trl_recipes.export import set_picture_options
from trl_recipes.mask_data import MaskCollator, load_mask_data, tokenise_masks
from trl_recipes.metrics import SegmentationMetrics
from trl_recipes.tasks.leakage import leave_out, write_exclusions

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 60, 20


def command(model: Path, data: Path, output: Path, /, **changes) -> list[str]:
    """Arguments of a run that learns the six requests by heart."""
    options = dict(
        model=model, data=data, eval_data=data, output=output, max_steps=STEPS, eval_steps=EVERY, save_steps=EVERY,
        learning_rate=2e-2, per_device_train_batch_size=6, max_adapter_share=0.5, lora_rank=8, use_cpu=True,
        disable_tqdm=True, logging_steps=5, cache_dir=data.parent / "cache",
    )  # fmt: skip
    return [str(word) for name, value in (options | changes).items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def known_folder(tmp_path_factory) -> Path:
    """A model that knows one photograph; its pictures are grey values, so that what it draws can be compared."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("known")
    model, processor = toy.build(tiny_scenes.grey_tokenizer((1, 2, 4, 8)))
    toy.learn(model, toy.lessons(processor), enough=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return own_masks.as_jsonl(tmp_path_factory.mktemp("data") / "own")


@pytest.fixture(scope="module")
def run(known_folder, data, tmp_path_factory) -> Path:
    """The output of a whole run."""
    output = tmp_path_factory.mktemp("run") / "out"
    lora.main(command(known_folder, data, output))
    return output


def test_the_run_learns_the_new_masks(run):
    measured = lora.read_metrics(run)
    assert [entry["step"] for entry in measured] == [0, 20, 40, 60]
    assert all(entry["count"] == 6 for entry in measured)
    assert measured[-1]["giou"] > measured[0]["giou"] + 0.2
    assert measured[-1]["n_acc"] == 1


def test_it_writes_what_it_promises(run):
    for name in ("check_masks", "learning_curve", *(f"drawn-{step:06d}" for step in (0, 20, 40, 60))):
        assert min(Image.open(run / f"{name}.png").size) > 100
    assert not list(run.rglob("*.part*"))
    assert {path.name for path in run.glob("checkpoint-*")} <= {"checkpoint-20", "checkpoint-40", "checkpoint-60"}
    assert (run / "adapter/adapter_model.safetensors").stat().st_size < (
        run / "merged/model.safetensors"
    ).stat().st_size


def best_step(run: Path) -> int:
    state = json.loads((run / "checkpoint-60/trainer_state.json").read_text())
    return int(state["best_model_checkpoint"].rpartition("-")[2])


def test_the_merged_folder_is_a_model_like_any_other(run, data):
    pipe, metrics = pipeline("image-segmentation", model=str(run / "merged")), SegmentationMetrics()
    for row in load_mask_data(data, progress=False):
        segments = pipe(row["image"], text=row["prompt"])
        truth = row["masks"][0] if row["masks"] else np.zeros((own_masks.HEIGHT, own_masks.WIDTH), bool)
        metrics.add(segments[0]["mask"] if segments else None, truth)
    told = {entry["step"]: entry["giou"] for entry in lora.read_metrics(run)}[best_step(run)]
    assert metrics.compute()["giou"] == pytest.approx(told, abs=1e-3)


def test_adapters_alone_give_the_same_model(run, known_folder, data):
    processor = AutoProcessor.from_pretrained(run / "merged")
    rows = tokenise_masks(load_mask_data(data, progress=False), processor, data.parent / "cache")
    batch = MaskCollator(processor)([rows[i] for i in range(6)])
    merged = AutoModelForImageTextToText.from_pretrained(run / "merged").eval()
    base = AutoModelForImageTextToText.from_pretrained(known_folder)
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).loss, adapted(**batch).loss, rtol=1e-4, atol=1e-5)


def test_only_the_adapted_layers_moved(run, known_folder):
    merged = AutoModelForImageTextToText.from_pretrained(run / "merged")
    before = AutoModelForImageTextToText.from_pretrained(known_folder).state_dict()
    check_what_moved(before, merged, new_parts=False)
    old, new = (load_file(folder / "visual_tokenizer/model.safetensors") for folder in (known_folder, run / "merged"))
    assert all(torch.equal(old[name], new[name]) for name in old)


def last_weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{STEPS}/adapter_model.safetensors")


def test_a_run_killed_with_sigkill_goes_on_with_the_same_command(run, known_folder, data, tmp_path):
    words = command(known_folder, data, tmp_path / "out")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, "-u", "-m", "trl_recipes.lora", *words]
    with subprocess.Popen(program, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        seen = 0
        for line in process.stdout:
            seen += "'loss'" in line
            if seen == 6:  # step 30
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out/merged").exists()
    lora.main(words)
    expected = last_weights(run)
    for name, tensor in last_weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    assert lora.read_metrics(tmp_path / "out") == lora.read_metrics(run)


def test_a_finished_run_writes_its_model_again(run, known_folder, data, tmp_path):
    shutil.copytree(run, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/merged")
    lora.main(command(known_folder, data, tmp_path / "out"))
    old, new = (load_file(folder / "merged/model.safetensors") for folder in (run, tmp_path / "out"))
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.fixture
def finished(run, tmp_path) -> Path:
    """A copy of the whole run, to be given its command again."""
    return shutil.copytree(run, tmp_path / "out")


def test_a_finished_run_trains_nothing_more(run, finished, known_folder, data, capsys):
    lora.main(command(known_folder, data, finished))
    assert f"finished at step {STEPS}" in capsys.readouterr().out
    for name in (f"checkpoint-{STEPS}/adapter_model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert {path.name for path in finished.glob("*")} == {path.name for path in run.glob("*")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4}, "lora_rank was 8 and is now 4"),
        ({"lora_targets": "attention"}, "lora_targets was 'all' and is now 'attention'"),
        ({"learning_rate": 1e-3}, "learning_rate was 0.02 and is now 0.001"),
        ({"seed": 7}, "seed was 42 and is now 7"),
        ({"search_steps": 6}, "training_data was"),
        ({"eval_samples": 5}, "validation_samples was 6 and is now 5"),
    ],
)
def test_an_output_of_other_options_is_refused(finished, known_folder, data, changes, message):
    with pytest.raises(SystemExit, match=rf"holds a run with other settings: .*{message}.*--output, or --overwrite"):
        lora.main(command(known_folder, data, finished, **changes))


def test_an_output_of_other_data_is_refused_until_it_may_be_overwritten(finished, known_folder, data, tmp_path):
    own = shutil.copytree(data.parent, tmp_path / "own")
    lora.prepare(*parsed(command(known_folder, own / data.name, finished, eval_data=data)))  # moved, and no other
    picture = Image.open(own / "images/0.png").convert("L").convert("RGB")
    picture.save(own / "images/0.png")
    with pytest.raises(SystemExit, match="settings: training_data was"):
        lora.main(command(known_folder, own / data.name, finished, eval_data=data))
    shutil.copy(own / "masks/0_disc.png", own / "masks/0_square.png")
    words = command(known_folder, own / data.name, finished, eval_data=data, overwrite=True, max_steps=2)
    (finished / "mine.txt").touch()
    lora.main(words)
    assert [entry["step"] for entry in lora.read_metrics(finished)] == [0, 2]
    assert [path.name for path in finished.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (finished / "mine.txt").is_file() and (finished / "merged/model.safetensors").is_file()


def test_an_output_of_an_earlier_version_goes_on(finished, known_folder, data, capsys):
    (finished / "run.json").unlink()
    lora.main(command(known_folder, data, finished))
    assert "was begun by an earlier version" in capsys.readouterr().out and (finished / "run.json").is_file()


@pytest.mark.slow
def test_two_processes_write_one_model(known_folder, data, tmp_path):
    steps = {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "logging_steps": 1}
    words = command(known_folder, data, tmp_path / "out", **steps, per_device_train_batch_size=3)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "trl_recipes.lora"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [entry["step"] for entry in lora.read_metrics(tmp_path / "out")] == [0, 1, 2]
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out/merged")
    assert not list((tmp_path / "out").rglob("*.part*"))
    lora.main(command(known_folder, data, tmp_path / "one", **steps, per_device_train_batch_size=6))
    states = (json.loads((tmp_path / f"{name}/checkpoint-2/trainer_state.json").read_text()) for name in ("out", "one"))
    two, one = ([entry for entry in state["log_history"] if "loss" in entry] for state in states)
    for name in ("loss", "text_loss", "visual_loss", "grad_norm"):  # of the same six rows
        assert [entry[name] for entry in two] == pytest.approx([entry[name] for entry in one], rel=2e-3), name


def parsed(words: list[str]) -> tuple[lora.LoraArguments, lora.LoraTrainingArguments]:
    return lora.make_parser().parse_args_into_dataclasses(words)


def test_the_masks_are_shown_before_the_first_step(known_folder, data, tmp_path, capsys):
    recipe, training = lora.make_parser().parse_args_into_dataclasses(command(known_folder, data, tmp_path))
    trainer, sizes = lora.prepare(recipe, training)
    said = capsys.readouterr().out
    assert said.count("IoU after tokenising") == 3 and "check_masks.png" in said
    assert f"adapters: {sizes.adapters:,} parameters, {sizes.share:.2%} of the model's {sizes.model:,}" in said
    assert trainer.state.global_step == 0 and not trainer.model_accepts_loss_kwargs
    processor = trainer.processor
    rows = trainer.train_dataset
    (_, decoded) = processor.decode_masks(processor.encode_masks(own_masks.masks()["square"]), [(40, 60)])
    truth = own_masks.masks()["square"]
    iou = (decoded[0] & truth).sum() / (decoded[0] | truth).sum()
    assert lora.check_masks(rows.select([0]), processor, tmp_path) == [pytest.approx(iou)]


def test_data_that_teach_to_draw_always_or_hardly_ever_are_warned_of(known_folder, data, tmp_path, capsys):
    trainer, _ = lora.prepare(*parsed(command(known_folder, data, tmp_path)))
    rows, processor = trainer.train_dataset, trainer.processor
    assert "WARNING: every" not in capsys.readouterr().out
    lora.check_masks(rows.select([0, 1]), processor, tmp_path)
    assert "every training sample has a mask" in (said := capsys.readouterr().out) and "--absent_per_image 1" in said
    lora.check_masks(rows.select([0, 2, 5]), processor, tmp_path)
    assert "WARNING: 2 of 3 training samples have no mask, or an empty one" in capsys.readouterr().out


def test_the_logit_adjustment_is_the_models_own_unless_it_is_given(known_folder, data, tmp_path):
    model, processor = lora.load_model(lora.LoraArguments(model=str(known_folder), data=str(data)), on_cpu=True)
    set_picture_options(model, picture_logit_adjustment=0.7)
    model.save_pretrained(tmp_path / "adjusted")
    processor.save_pretrained(tmp_path / "adjusted")
    for start, given, expected in ((tmp_path / "adjusted", None, 0.7), (tmp_path / "adjusted", 0.0, 0.0),
                                   (known_folder, 0.25, 0.25)):  # fmt: skip
        recipe = lora.LoraArguments(model=str(start), data=str(data), picture_logit_adjustment=given)
        model, processor = lora.load_model(recipe, on_cpu=True)
        adapted, _ = add_adapters(model, lora_config(model, 1, max_share=0.5), 0.5)
        assert adapted.generation_config.picture_logit_adjustment == expected  # validation draws with it
        folder = lora.save_merged(adapted, processor, tmp_path / f"merged-{expected}")
        again = AutoModelForImageTextToText.from_pretrained(folder)
        assert again.generation_config.picture_logit_adjustment == expected


def test_a_merged_model_that_is_in_use_stays_whole(known_folder, tmp_path, monkeypatch):
    model, processor = lora.load_model(lora.LoraArguments(model=str(known_folder), data="none"), on_cpu=True)
    folder = shutil.copytree(known_folder, tmp_path / "merged")
    before = sorted(path.name for path in folder.iterdir())

    replace = Path.replace

    def in_use(self, target):  # as on Windows
        if self.name == "merged.part":
            raise PermissionError(f"{self} is open")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", in_use)
    adapted, _ = add_adapters(model, lora_config(model, 1, max_share=0.5), 0.5)
    with pytest.raises(ValueError, match=r"merged cannot be replaced .*; the new model is in .*merged.part"):
        lora.save_merged(adapted, processor, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (tmp_path / "merged.part" / "model.safetensors").is_file()


def test_how_long_masks_are_searched_for_goes_with_the_processor(known_folder, data, tmp_path):
    ids = {}
    for steps in (None, 6):
        words = command(known_folder, data, tmp_path / str(steps), **({} if steps is None else {"search_steps": steps}))
        trainer, _ = lora.prepare(*lora.make_parser().parse_args_into_dataclasses(words))
        assert trainer.processor.visual_tokenizer.config.search_steps == (steps or 0)
        ids[steps] = trainer.train_dataset["input_ids"]
    assert ids[None] != ids[6]  # not those of the cache


def test_without_validation_data_images_are_set_aside(data):
    recipe = lora.LoraArguments(model="model", data=str(data), validation_share=0.3)
    train, validation = lora.load_data(recipe, seed=0, progress=False)
    assert len(train) == len(validation) == 3 and not set(train["image_id"]) & set(validation["image_id"])
    recipe = lora.LoraArguments(model="model", data=str(data), eval_data=str(data), eval_samples=4)
    assert len(lora.load_data(recipe, seed=0, progress=False)[1]) == 4


def test_held_out_images_of_coco_are_left_out(tmp_path, capsys):
    path = own_masks.as_jsonl(tmp_path / "own")
    held_out = tmp_path / "held_out.txt"
    recipe = lora.LoraArguments(model="model", data=str(path), leave_out=str(held_out))
    with pytest.raises(ValueError, match=r"there is no file .*held_out.txt'; `trl_recipes.tasks leakage` writes one"):
        lora.load_data(recipe, seed=0, with_validation=False)
    write_exclusions(held_out, {581857}, ["refcoco/val"])
    with pytest.raises(ValueError, match="no image has a file name of COCO"):
        lora.load_data(recipe, seed=0, with_validation=False)
    for number, name in enumerate(("COCO_train2014_000000581857", "COCO_train2014_000000000009")):
        (path.parent / f"images/{number}.png").rename(path.parent / f"images/{name}.png")
        path.write_text(path.read_text().replace(f"images/{number}.png", f"images/{name}.png"))
    train, _ = lora.load_data(recipe, seed=0, with_validation=False)
    assert len(train) == 3 and all("000000000009" in name for name in train["image_id"])
    assert f"left out 3 of 6 samples, whose images are in {held_out}" in capsys.readouterr().out
    names = ("COCO_train2014_000000581857.jpg", "COCO_train2014_000000000009.jpg", "581857.png", None)
    stored = [{"image": {"path": name, "bytes": b""}} for name in names]  # as a table has them
    assert len(leave_out(Dataset.from_list(stored, features=Features({"image": ImageFeature()})), held_out)) == 3
    assert "WARNING: 2 samples are kept whose images have no" in capsys.readouterr().out
    write_exclusions(held_out, {9, 581857}, ["refcoco/val"])
    with pytest.raises(ValueError, match="names every image of the training data"):
        lora.load_data(recipe, seed=0, with_validation=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere.jsonl"}, "there is no file or folder 'nowhere.jsonl'"),
        ({"columns": "picture=photo"}, "--columns takes image=NAME"),
        ({"max_adapter_share": 1e-4}, "--lora_targets attention"),
        ({"lora_rank": 0}, "--lora_rank 0: the smallest rank is 1"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor would change nothing"),
        ({"eval_samples": 0}, "--eval_samples 0: give at least 1"),
        ({"eval_steps": 0.25, "save_steps": 0.1}, r"--save_steps 0\.25.*--load_best_model_at_end False"),
        ({"eval_steps": 2, "save_steps": 1}, "--save_steps 2"),
        ({"eval_strategy": "no"}, "--save_strategy as --eval_strategy"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere is no whole checkpoint"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(known_folder, data, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        lora.main(command(known_folder, data, tmp_path, **changes))


def test_a_bad_sample_stops_the_run_at_the_start(known_folder, tmp_path):
    rows = own_masks.rows()
    rows[4]["mask"] = "masks/lost.png"
    path = own_masks.write_jsonl(own_masks.write_pictures(tmp_path / "own") / "own.jsonl", rows)
    with pytest.raises(SystemExit, match=r"error: .*own\.jsonl line 5, field 'mask': there is no file"):
        lora.main(command(known_folder, path, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())
    recipe = lora.LoraArguments(model="model", data=str(path), skip_bad_samples=True, eval_data=str(path))
    assert len(lora.load_data(recipe, seed=0, progress=False)[0]) == 5


def test_the_output_must_be_named(known_folder, data):
    with pytest.raises(SystemExit, match="--output"):
        lora.main(["--model", str(known_folder), "--data", str(data)])


@pytest.fixture(scope="module")
def fresh_folder(known_folder, tmp_path_factory) -> Path:
    """The model with its new parts as `from_vlm` starts them."""
    model, folder = AutoModelForImageTextToText.from_pretrained(known_folder), tmp_path_factory.mktemp("fresh")
    parts = (model.model.generation_projector, model.model.scale_embedding, model.model.position_embedding)
    with torch.no_grad():
        for parameter in (p for part in parts for p in part.parameters()):
            parameter.zero_()
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(known_folder).save_pretrained(folder)
    return folder


def test_new_parts_are_trained_checkpointed_and_merged(fresh_folder, data, tmp_path, capsys):
    words = command(fresh_folder, data, tmp_path / "out", max_steps=4, eval_steps=2, save_steps=2)
    words += ["--load_best_model_at_end", "False"]
    lora.main(words)
    assert "new parts that train whole" in capsys.readouterr().out
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/merged")
    before = AutoModelForImageTextToText.from_pretrained(fresh_folder).state_dict()
    check_what_moved(before, merged, new_parts=True)
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    lora.main(words)  # goes on from the second step
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/merged").state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-5)


def test_trainer_itself_does_with_the_same_parts(known_folder, data, tmp_path):
    processor = AutoProcessor.from_pretrained(known_folder)
    model = AutoModelForImageTextToText.from_pretrained(known_folder)
    rows = tokenise_masks(load_mask_data(data, progress=False), processor, data.parent / "cache")
    adapted, _ = add_adapters(model, lora_config(model, 8, max_share=0.5), 0.5)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=10, learning_rate=2e-2, per_device_train_batch_size=6, remove_unused_columns=False,
        use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = Trainer(adapted, arguments, train_dataset=rows, data_collator=MaskCollator(processor))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_requests_that_cannot_be_asked_are_told_before_the_first_step(known_folder, data, tmp_path):
    bad = own_masks.rows()[:2] + [own_masks.rows()[0] | {"prompt": "the <mask> of the man"}]
    own_masks.write_jsonl(data.parent / "bad.jsonl", bad)
    words = command(known_folder, data, tmp_path / "out", eval_data=data.parent / "bad.jsonl")
    with pytest.raises(SystemExit, match="bad.jsonl line 3.*<mask>"):
        lora.main(words)
    trainer, _ = lora.prepare(*parsed([*words, "--skip_bad_samples", "True"]))
    assert len(trainer.validation) == 2


def test_without_evaluation_everything_is_for_training(known_folder, data, tmp_path):
    words = command(known_folder, data, tmp_path / "out", eval_strategy="no", load_best_model_at_end=False)
    words = [word for word in words if word not in ("--eval_data",)]
    del words[words.index(str(data), words.index(str(data)) + 1)]
    trainer, _ = lora.prepare(*parsed(words))
    assert len(trainer.train_dataset) == 6 and len(trainer.validation) == 0


def test_evaluation_on_start_alone_needs_its_data(known_folder, data, tmp_path):
    options = {"eval_strategy": "no", "load_best_model_at_end": False, "eval_on_start": True}
    trainer, _ = lora.prepare(*parsed(command(known_folder, data, tmp_path / "out", **options)))
    assert len(trainer.validation) == 6


def test_a_metric_that_is_not_measured_is_told_at_once(known_folder, data, tmp_path):
    words = command(known_folder, data, tmp_path / "out", metric_for_best_model="loss")
    with pytest.raises(SystemExit, match="--metric_for_best_model loss: these validation data give giou, ciou"):
        lora.main(words)
