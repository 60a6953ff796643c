"""The scene recipe: the loss over shared images, runs that are killed, and its stages."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_scenes
import torch
from safetensors.torch import load_file

from modeling_argenseg.cache_name import CACHE
from processing import ARGenSegProcessor
from trl_recipes import train_scenes
from trl_recipes.metrics import SegmentationMetrics
from trl_recipes.scene_samples import PictureEncoder, SceneCollator, model_inputs, unpack
from trl_recipes.scenes import SceneConfig, SceneDataset, flat_expressions
from trl_recipes.train_scenes import SceneTrainer, curriculum, load_or_build, make_parser

ROOT = Path(__file__).parents[2]
CHECKPOINT, LAST_STEP = 3, 8  # checkpoints at 3, 6 and 8


@pytest.fixture
def collated(parts, samples):
    """The first two scenes as the data loader has them, and as any model takes them."""
    pad, both = parts[1].tokenizer.pad_token_id, [samples[0], samples[1]]
    batch = SceneCollator(pad, shared_length=len(samples.writer.head))(both)
    return batch, model_inputs(both, SceneCollator(pad), PictureEncoder(parts[1]))


def make_trainer(parts, samples, scenes, output: Path, **changes) -> SceneTrainer:
    return SceneTrainer(
        model=parts[0],
        args=tiny_scenes.training_arguments(output),
        train_dataset=samples,
        processor=parts[1],
        validation=flat_expressions(scenes, 4),
        recipe=tiny_scenes.scene_arguments("bank", "tokenizer", **changes),
    )


@pytest.mark.parametrize("visual_loss", ["scale", "token"])
@pytest.mark.parametrize("shares_beginning", [False, True])
def test_what_rows_share_and_a_head_at_the_answers_alone_change_no_gradient(
    parts, samples, known_scenes, collated, tmp_path, visual_loss, shares_beginning
):
    model, processor = parts
    model.config.visual_loss = visual_loss
    trainer = make_trainer(parts, samples, known_scenes, tmp_path)
    batch, whole = collated
    assert "words" in batch  # something that is not there
    if not shares_beginning:
        del batch["shared_length"]
    read = []
    hook = model.model.language_model.register_forward_hook(lambda *args: read.append(args[-1]))
    weights = [p for p in model.parameters() if p.requires_grad]
    plain = model(**whole).loss
    expected = torch.autograd.grad(plain, weights)
    read.clear()
    loss = trainer.compute_loss(model, dict(batch))
    hook.remove()
    rows, length, words = *batch["input_ids"].shape, batch["words"]["input_ids"].shape[1]
    if shares_beginning:  # 2 images, not 8 times
        begun = batch["shared_length"]
        assert begun > processor.image_seq_length
        assert [len(one.last_hidden_state) for one in read] == [2, rows, 8 - rows]
        assert [one.last_hidden_state.shape[1] for one in read] == [begun, length - begun, words - begun]
    else:  # no cache is filled for nothing
        assert [getattr(one, CACHE) for one in read] == [None, None]
        assert {one.last_hidden_state.shape[1] for one in read} == {length, words}
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, weights), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shares_beginning", [False, True])
def test_queries_are_told_what_the_masks_cover(
    parts, samples, known_scenes, collated, tmp_path, monkeypatch, shares_beginning
):
    model, processor = parts
    trainer = make_trainer(parts, samples, known_scenes, tmp_path, mask_region_weight=0.5)
    length = len(samples.writer.head) if shares_beginning else 0
    collator = SceneCollator(processor.tokenizer.pad_token_id, rows_multiple=5, shared_length=length)
    batch, (_, whole) = collator([samples[0], samples[1]]), collated
    heard, query_loss = [], trainer.query_loss
    monkeypatch.setattr(trainer, "query_loss", lambda *parts: heard.append((*parts, query_loss(*parts))) or heard[0][3])
    loss = trainer.compute_loss(model, dict(batch))
    hidden, images, shares, part = heard[0]
    with torch.no_grad():
        out = model(**whole, output_hidden_states=True)
    rows, columns = model.model.find_pictures(whole["input_ids"])
    masks = [mask for i in (0, 1) for mask in unpack(torch.from_numpy(samples[i]["masks"]))]
    assert len(batch["input_ids"]) > len(rows) == len(masks) == len(hidden)  # what fills up is no picture
    assert images.tolist() == [i for i in (0, 1) for _ in samples[i]["masks"]]
    places = columns[:, None] + torch.arange(processor.num_visual_tokens)
    torch.testing.assert_close(hidden, out.hidden_states[-1][rows[:, None], places])
    torch.testing.assert_close(shares[:, 0], torch.stack([mask.mean() for mask in masks]))
    torch.testing.assert_close(loss, out.loss + part)
    torch.testing.assert_close(part, 0.5 * trainer.mask_regions(hidden, shares, images))


def test_the_head_runs_where_it_is_told_to(parts, collated):
    (model, processor), (_, batch) = parts, collated
    answers = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    with torch.no_grad():
        whole = model(**batch, skip_logits=False)
        part = model(**batch, logits_to_keep=answers, skip_logits=False)
    assert part.logits.shape == (int(answers.sum()), len(processor.tokenizer))
    torch.testing.assert_close(part.logits, whole.logits[answers])
    for name in ("loss", "text_loss", "visual_loss"):
        torch.testing.assert_close(part[name], whole[name])


def test_each_preset_has_an_equal_part_of_the_run():
    assert curriculum(["easy", "full", "easy"], 31) == [(0, "easy"), (10, "full"), (20, "easy")]
    assert curriculum(["full"], 1) == [(0, "full")]


@pytest.mark.parametrize("total", [-8, 2])
def test_a_run_too_short_for_its_presets_is_refused(total):
    with pytest.raises(ValueError, match="--max_steps"):
        curriculum(["easy", "medium", "full"], total)


def test_a_run_ends_when_its_time_is_over(bank_folder, tokenizer_folder, tmp_path):
    run(*command(bank_folder, tokenizer_folder, tmp_path, minutes=1e-4, max_steps=500, save_steps=500))
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "checkpoint-500").exists()


def test_a_run_whose_time_is_short_has_all_presets_and_its_warm_up(
    bank_folder, tokenizer_folder, tmp_path, monkeypatch
):
    clock, composed, config_at = iter(range(10_000)), [], SceneDataset.config_at
    monkeypatch.setattr("trl_recipes.clock.time", SimpleNamespace(monotonic=lambda: next(clock)))  # a second a look
    monkeypatch.setattr(
        SceneDataset, "config_at", lambda self, index: composed.append(config_at(self, index)) or composed[-1]
    )
    options = dict(minutes=0.5, max_steps=100_000, save_steps=1, save_total_limit=1, warmup_steps=0.2)
    arguments = command(bank_folder, tokenizer_folder, tmp_path, **options)
    place = arguments.index("--schedule") + 1
    run(*arguments[:place], "easy", "medium", "full", "names", *arguments[place + 1 :])
    rates = list(tiny_scenes.logged(tmp_path, "learning_rate").values())
    assert 10 <= len(rates) <= 31 and max(rates) > 0.7e-3 and rates.index(max(rates)) < 0.4 * len(rates)
    presets = [SceneConfig.preset(name) for name in ("easy", "medium", "full", "names")]
    seen = [presets.index(config) for config in composed[-len(rates) :]]
    assert seen == sorted(seen) and all(seen.count(i) >= len(rates) // 4 - 2 for i in range(4))


def command(bank: Path, tokenizer: Path, output: Path, **changes) -> list[str]:
    """Arguments of a run of `LAST_STEP` steps; every step is logged."""
    options = dict(
        bank=bank, visual_tokenizer=tokenizer, output_dir=output, hidden_size=64, num_layers=1, vision_layers=1,
        eval_expressions=2, num_scales=3, schedule="easy", use_cpu=True,
        image_tokens=64, freeze_trunk=True,
        max_steps=LAST_STEP, save_steps=CHECKPOINT, logging_steps=1, per_device_train_batch_size=1,
        learning_rate=1e-3, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    options |= {} if "start_from" in changes else tiny_scenes.SHORT_TEXTS
    return [str(word) for name, value in (options | changes).items() for word in (f"--{name}", value)]


def run(*arguments: str) -> None:
    train_scenes.main(*make_parser().parse_args_into_dataclasses(list(arguments)))


@pytest.fixture(scope="module")
def whole_run(bank_folder, tokenizer_folder, tmp_path_factory) -> Path:
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(*command(bank_folder, tokenizer_folder, folder))
    return folder


def copy_without_end(whole_run: Path, folder: Path) -> Path:
    """What the run would have left if it had been killed while it wrote its second checkpoint."""
    for step in (CHECKPOINT, 2 * CHECKPOINT):
        shutil.copytree(whole_run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    (folder / f"checkpoint-{2 * CHECKPOINT}" / "trainer_state.json").unlink()
    return folder


def check_same(folder: Path, whole_run: Path) -> None:
    """Every logged number and the final weights are those of the run that was not interrupted."""
    for name in ("loss", "text_loss", "visual_loss", "grad_norm", "learning_rate"):
        expected = tiny_scenes.logged(whole_run, name)
        assert list(expected) == list(range(1, LAST_STEP + 1))
        assert tiny_scenes.logged(folder, name) == pytest.approx(expected, rel=1e-6), name
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, whole_run))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def test_a_run_learns(whole_run):
    losses = list(tiny_scenes.logged(whole_run).values())
    assert losses[-1] < losses[0] - 0.5


def kill_after(lines: int, arguments: list[str]) -> None:
    """Starts a run and kills it with SIGKILL once it has logged the loss of that many steps."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-u", "-m", "trl_recipes.train_scenes", *arguments]
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            lines -= "'loss'" in line
            if lines == 0:
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL, f"the run ended by itself: {process.returncode}"


def test_a_run_killed_with_sigkill_goes_on_as_if_nothing_had_happened(
    whole_run, bank_folder, tokenizer_folder, tmp_path
):
    arguments = command(bank_folder, tokenizer_folder, tmp_path)
    kill_after(CHECKPOINT + 1, arguments)
    written = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert written == [f"checkpoint-{CHECKPOINT}"] and not (tmp_path / "model.safetensors").exists()
    words = [sys.executable, "-m", "trl_recipes.train_scenes", *arguments]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("'loss'") == LAST_STEP - CHECKPOINT
    check_same(tmp_path, whole_run)


def test_a_checkpoint_that_was_cut_off_is_passed_over(whole_run, bank_folder, tokenizer_folder, tmp_path):
    run(*command(bank_folder, tokenizer_folder, copy_without_end(whole_run, tmp_path)))
    check_same(tmp_path, whole_run)


def test_a_finished_run_stays_as_it_is(whole_run, bank_folder, tokenizer_folder, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole_run, output)
    run(*command(bank_folder, tokenizer_folder, output))
    assert f"finished at step {LAST_STEP}" in capsys.readouterr().out
    assert not (output / f"checkpoint-{LAST_STEP + 1}").exists()
    check_same(output, whole_run)


def test_the_parts_of_the_loss_are_means_over_the_logged_steps(whole_run, bank_folder, tokenizer_folder, tmp_path):
    run(*command(bank_folder, tokenizer_folder, tmp_path, logging_steps=2, save_steps=LAST_STEP))
    for name in ("text_loss", "visual_loss"):
        every = tiny_scenes.logged(whole_run, name)
        means = {step: (every[step - 1] + every[step]) / 2 for step in (2, 4, 6, 8)}
        assert tiny_scenes.logged(tmp_path, name) == pytest.approx(means, abs=2e-4)


def test_the_second_stage_begins_where_the_first_ended(whole_run, bank_folder, tokenizer_folder, tmp_path):
    options = dict(start_from=str(whole_run), num_scales=None, visual_loss="token", visual_loss_weight=0.7)
    recipe = tiny_scenes.scene_arguments(bank_folder, tokenizer_folder, **options)
    model, processor = load_or_build(recipe, None)
    assert processor.num_visual_tokens == 85 and model.config.picture_length == 85
    # of this run, not of the first
    assert (model.config.visual_loss, model.config.visual_loss_weight) == ("token", 0.7)
    stored, loaded = load_file(whole_run / "model.safetensors"), model.state_dict()
    assert loaded.keys() - stored.keys() == {"lm_head.weight"}  # tied to the embedding
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    arguments = command(bank_folder, tokenizer_folder, tmp_path, start_from=whole_run, num_scales=4, max_steps=2)
    run(*arguments)
    assert json.loads((tmp_path / "config.json").read_text())["num_scales"] == 4
    assert json.loads((tmp_path / "processor_config.json").read_text())["num_scales"] == 4
    first, second = tiny_scenes.logged(whole_run), tiny_scenes.logged(tmp_path)
    assert list(second) == [1, 2] and second[1] < first[1]  # its text is learned already


@pytest.mark.parametrize(("given", "expected"), [(None, "block"), ("causal", "causal")])
def test_who_sees_whom_is_as_before_unless_it_is_said(whole_run, bank_folder, tokenizer_folder, given, expected):
    options = dict(start_from=str(whole_run), scale_attention=given)
    model, _ = load_or_build(tiny_scenes.scene_arguments(bank_folder, tokenizer_folder, **options), None)
    assert model.config.scale_attention == expected


def test_a_trunk_that_was_kept_learns_where_the_next_run_says_so(whole_run, bank_folder, tokenizer_folder):
    for frozen in (False, True):
        options = dict(start_from=str(whole_run), freeze_trunk=frozen, image_size=384)
        model, _ = load_or_build(tiny_scenes.scene_arguments(bank_folder, tokenizer_folder, **options), None)
        trunk = model.train().model.vlm.vision_tower.trunk
        assert {parameter.requires_grad for parameter in trunk.parameters()} == {not frozen}
        assert model.config.vlm_config.vision_config.image_size == [384, 384]


def test_images_of_a_size_that_the_weights_do_not_fit_are_refused(whole_run, bank_folder, tokenizer_folder):
    """In memory nothing would tell; the model that is saved could not be loaded again."""
    for side in (128, 512):
        options = dict(start_from=str(whole_run), image_size=side)
        with pytest.raises(ValueError, match=f"--image_size {side}: .* the weights are for"):
            load_or_build(tiny_scenes.scene_arguments(bank_folder, tokenizer_folder, **options), None)


def test_what_makes_the_image_tokens_can_be_kept_as_it_is(whole_run, bank_folder, tokenizer_folder, tmp_path):
    options = dict(freeze_vision=True, mask_region_weight=0.5, slips=1, schedule="names", expressions_per_scene=2)
    run(*command(bank_folder, tokenizer_folder, tmp_path, start_from=whole_run, max_steps=2, **options))
    before, after = (load_file(folder / "model.safetensors") for folder in (whole_run, tmp_path))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    vision = {name for name in before if "vision_tower" in name or "multi_modal_projector" in name}
    assert vision and vision <= kept and not any("language_model" in name for name in kept)
    assert all(loss > 0 for loss in tiny_scenes.logged(tmp_path, "mask_region_loss").values())


def test_overfitting_learns_the_requests_it_is_evaluated_on(learned_folder, known_scenes):
    losses = tiny_scenes.logged(learned_folder)
    assert losses[1] > 5 and losses[160] < 0.1
    found = {name: tiny_scenes.logged(learned_folder, f"eval_{name}")[160] for name in ("count", "n_acc", "t_acc")}
    assert found == {"count": 4, "n_acc": 1, "t_acc": 1}
    giou = tiny_scenes.logged(learned_folder, "eval_giou")[160]
    assert giou == pytest.approx(best_giou(learned_folder, known_scenes), abs=0.02)


def best_giou(folder: Path, scenes) -> float:
    """What answers can have at best: the true pictures, of three scales."""
    processor = ARGenSegProcessor.from_pretrained(folder)
    metrics = SegmentationMetrics()
    for expression in scenes[0]["expressions"]:
        truth = expression["mask"]
        _, (drawn,) = processor.decode_masks(processor.encode_masks(truth), [truth.shape])
        metrics.add(drawn, truth)
    return metrics.compute()["giou"]
