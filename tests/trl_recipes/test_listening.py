"""Listening: whole pictures beside coarse ones, and what holds the fine scales to what they were."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_scenes
import torch
from safetensors.torch import load_file

from processing import ARGenSegProcessor
from trl_recipes import listening, train_scenes
from trl_recipes.listening import ListeningArguments, ListeningTrainer
from trl_recipes.scene_samples import PictureEncoder, SceneCollator, SceneSamples, model_inputs
from trl_recipes.scenes import flat_expressions
from trl_recipes.train_scenes import load_or_build

COARSE = 3  # of four scales


@pytest.fixture(scope="module")
def start(parts, tmp_path_factory) -> Path:
    """A model with all scales to go on from."""
    folder = tmp_path_factory.mktemp("start")
    for part in parts:
        part.save_pretrained(folder)
    return folder


def arguments(start: Path | None, bank: Path, tokenizer: Path, **changes) -> ListeningArguments:
    same = asdict(tiny_scenes.scene_arguments(bank, tokenizer, start_from=None if start is None else str(start)))
    return ListeningArguments(**(same | {"num_scales": COARSE, "freeze_vision": True, "slips": 1.0} | changes))


@pytest.fixture
def trainer(start, bank_folder, tokenizer_folder, known_scenes, tmp_path) -> ListeningTrainer:
    return make_trainer(arguments(start, bank_folder, tokenizer_folder, held_requests=2), known_scenes, tmp_path)


def make_trainer(recipe: ListeningArguments, scenes, output: Path) -> ListeningTrainer:
    model, processor = load_or_build(recipe, scenes)
    return ListeningTrainer(
        model=model.train(),
        args=tiny_scenes.training_arguments(output),
        train_dataset=SceneSamples(scenes, processor),
        processor=processor,
        validation=flat_expressions(scenes, 4),
        recipe=recipe,
    )


def collate(trainer: ListeningTrainer, **options) -> dict:
    samples = trainer.train_dataset
    collator = SceneCollator(trainer.processor.tokenizer.pad_token_id, **options)
    return collator([samples[0], samples[1]])


def whole_streams(trainer: ListeningTrainer, parts, scenes) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The streams of the same requests as the recipe makes them for whole pictures, with their labels."""
    processor = parts[1]
    samples = SceneSamples(scenes, processor)
    collator = SceneCollator(processor.tokenizer.pad_token_id, multiple_of=1)
    batch = model_inputs([samples[0], samples[1]], collator, PictureEncoder(processor))
    rows = zip(batch["input_ids"], batch["attention_mask"].sum(1), batch["labels"], strict=True)
    return {tuple(ids[:length].tolist()): tuple(labels[:length].tolist()) for ids, length, labels in rows}


@pytest.mark.parametrize("rows_multiple", [1, 5])
def test_some_requests_of_each_image_are_answered_by_whole_pictures(trainer, parts, known_scenes, rows_multiple):
    batch = collate(trainer, rows_multiple=rows_multiple)
    expected = whole_streams(trainer, parts, known_scenes)
    seen = set()
    for _ in range(8):
        with trainer.all_scales():
            held = trainer.held(batch)
        assert held["image_index"].tolist() == [0, 0, 1, 1] and len(held["pixel_values"]) == 2
        for ids, mask, labels in zip(held["input_ids"], held["attention_mask"], held["labels"], strict=True):
            length = int(mask.sum())
            stream = tuple(ids[:length].tolist())
            assert expected[stream] == tuple(labels[:length].tolist())
            assert mask[:length].all() and (labels[length:] == -100).all()
            seen.add(stream)
    assert len(seen) > 4  # not the same ones every time
    assert trainer.processor.num_scales == trainer.model.config.num_scales == COARSE


def test_whole_pictures_add_what_they_learn_and_what_holds_them(trainer, parts, monkeypatch):
    trainer.recipe.held_requests = 9  # all
    trainer.encoder.slips = 0.0
    batch = collate(trainer, shared_length=len(trainer.train_dataset.writer.head))
    model, before = trainer.model, parts[0]
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += 0.05 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    coarse = super(ListeningTrainer, trainer).compute_loss(model, batch)
    loss = trainer.compute_loss(model, batch)
    with trainer.all_scales():
        held = trainer.held(batch)
        held.pop("shared_length")
        by_name = held.pop("by_name")
        images = held.pop("pixel_values")[held.pop("image_index")]
        now, then = (
            one(**held, pixel_values=images, logits_to_keep=before_visual(model, held["labels"]), skip_logits=False)
            for one in (model, before)
        )
        codes = held["labels"][model.config.is_visual(held["labels"])] - model.config.visual_token_offset
        scales = model.scale_of_tokens(held["input_ids"])
    scales = scales[scales >= 0]
    named = by_name.repeat_interleave(len(codes) // len(by_name))
    assert named.any() and not named.all()
    usual = 0.6 * torch.stack([before.model.quantizer.log_frequency(scale) for scale in range(4)])[scales]
    visual = slice(model.config.visual_token_offset, None)
    right = -now.logits[:, visual].log_softmax(-1).gather(1, codes[:, None])[:, 0]
    ours, theirs = ((out.logits[:, visual] - usual).log_softmax(-1) for out in (now, then))
    far = (theirs.exp() * (theirs - ours)).sum(1)
    first, others = (
        torch.stack([one[which & (scales == scale)].mean() for scale in (0, 1)]).mean()
        for one, which in ((right, named), (far, ~named))
    )
    last = torch.stack([far[scales == scale].mean() for scale in (2, 3)]).mean()
    assert others > 1e-3 and last > 1e-3
    expected = coarse + model.config.visual_loss_weight * first + trainer.recipe.hold_weight * (others + last)
    torch.testing.assert_close(loss, expected)


def before_visual(model, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(model.config.is_visual(labels[:, 1:]), (0, 1))


def test_nothing_pulls_at_a_model_that_is_what_it_was(trainer):
    with trainer.all_scales():
        first, gone = trainer.hold(trainer.model, trainer.held(collate(trainer)))
    weights = [p for p in trainer.model.model.language_model.parameters() if p.requires_grad]
    assert gone.abs() < 1e-6 and first > 0.1
    pulls = torch.autograd.grad(gone, weights, retain_graph=True, allow_unused=True)
    learns = torch.autograd.grad(first, weights, allow_unused=True)
    assert max(p.abs().max() for p in pulls if p is not None) < 1e-5
    assert max(p.abs().max() for p in learns if p is not None) > 1e-3


def test_a_run_ends_with_whole_pictures(start, bank_folder, tokenizer_folder, tmp_path):
    recipe = arguments(start, bank_folder, tokenizer_folder, schedule=["names"], mask_region_weight=1.0)
    training = tiny_scenes.training_arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    listening.main(recipe, training)
    assert json.loads((tmp_path / "config.json").read_text())["num_scales"] is None
    processor = ARGenSegProcessor.from_pretrained(tmp_path)
    assert processor.num_scales is None and processor.num_visual_tokens == 85
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    vision = {name for name in before if "vision_tower" in name or "multi_modal_projector" in name}
    assert vision and vision <= kept and not any("language_model" in name for name in kept)
    for name in ("mask_region_loss", "first_scales_loss", "hold_loss"):
        assert list(tiny_scenes.logged(tmp_path, name)) == [1, 3], name  # the second scene draws nothing


def test_what_holds_draws_whole_pictures_whatever_it_was_trained_on(
    parts, start, bank_folder, tokenizer_folder, known_scenes, tmp_path
):
    parts[0].save_pretrained(tmp_path / "coarse")
    config = json.loads((tmp_path / "coarse" / "config.json").read_text())
    (tmp_path / "coarse" / "config.json").write_text(json.dumps(config | {"num_scales": COARSE}))
    recipe = arguments(start, bank_folder, tokenizer_folder, hold_to=str(tmp_path / "coarse"))
    trainer = make_trainer(recipe, known_scenes, tmp_path)
    with trainer.all_scales():
        _, gone = trainer.hold(trainer.model, trainer.held(collate(trainer)))
    assert gone.abs() < 1e-6


def test_a_run_needs_a_model_to_go_on_from(bank_folder, tokenizer_folder, known_scenes, tmp_path):
    with pytest.raises(ValueError, match="--start_from"):
        make_trainer(arguments(None, bank_folder, tokenizer_folder), known_scenes, tmp_path)


def test_options_are_those_of_the_scene_recipe():
    recipe, _ = listening.make_parser().parse_args_into_dataclasses(
        ["--bank", "b", "--visual_tokenizer", "v", "--output_dir", "o", "--hold_weight", "1.5"]
    )
    assert (recipe.hold_weight, recipe.num_scales, recipe.slips, recipe.freeze_vision) == (1.5, 4, 1.0, True)
    assert set(asdict(train_scenes.SceneArguments(bank="b", visual_tokenizer="v"))) <= set(asdict(recipe))
