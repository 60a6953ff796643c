"""The recipe of the visual tokenizer: masks, its measure, the fitted codebook, and runs of toy size."""

import json
import shutil
from math import log

import numpy as np
import pytest
import tiny_scenes
import torch
from PIL import Image

from modeling_argenseg import MultiScaleQuantizer, VARTokenizer, VARTokenizerConfig
from trl_recipes import train_visual_tokenizer
from trl_recipes.codebook import fit_codebook
from trl_recipes.masks import MaskPictures, compose_masks
from trl_recipes.train_visual_tokenizer import TokenizerArguments, build, judge

STEPS, FIT_AT = 60, 40  # the codebook is fitted after 40 of 60 steps


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize("count", [1, 5, 12])
def test_masks_are_as_many_as_asked_for_and_the_cache_holds_the_same(bank_folder, tmp_path, count):
    cache = tmp_path / "new" / "masks.npy"
    masks = compose_masks(bank_folder, "train", count, seed=0, cache=cache)
    assert masks.shape == (count, 256, 256) and masks.dtype == bool and masks.any((1, 2)).all()
    modified = cache.stat().st_mtime_ns
    assert np.array_equal(compose_masks(bank_folder, "train", count, seed=0, cache=cache), masks)
    assert cache.stat().st_mtime_ns == modified


def test_a_cache_with_too_few_masks_is_made_anew(bank_folder, tmp_path):
    cache = tmp_path / "masks.npy"
    compose_masks(bank_folder, "train", 4, seed=0, cache=cache)
    assert len(compose_masks(bank_folder, "train", 8, seed=0, cache=cache)) == len(np.load(cache)) == 8


def half(side: int) -> np.ndarray:
    """(1, side, side): the left half."""
    return np.broadcast_to(np.arange(side) < side // 2, (1, side, side))


def test_pictures_of_masks_are_black_and_white_and_depend_on_their_index_alone():
    plain = MaskPictures(half(64), 16, seed=None)[0]["pixel_values"]
    assert plain.shape == (3, 16, 16)
    assert plain[:, :, :7].eq(1).all() and plain[:, :, 9:].eq(-1).all()
    changed = MaskPictures(half(64), 16, seed=3, length=50)
    pictures = [changed[i]["pixel_values"] for i in range(50)]
    assert torch.equal(pictures[7], MaskPictures(half(64), 16, seed=3)[7]["pixel_values"])
    assert not torch.equal(pictures[7], MaskPictures(half(64), 16, seed=4)[7]["pixel_values"])
    shares = torch.stack([(picture > 0).float().mean() for picture in pictures])
    assert 0.3 < shares.mean() < 0.7 and shares.std() > 0.05  # zoomed
    mirrored = sum(bool(picture[0, 8, 0] < picture[0, 8, -1]) for picture in pictures)
    assert 10 < mirrored < 40


def test_photos_are_mixed_in_as_often_as_told(tmp_path):
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    mixed = MaskPictures(half(64), 16, 0, photos=[tmp_path / "red.png"], photo_share=0.25, length=200)
    red = sum(bool((mixed[i]["pixel_values"][1] < mixed[i]["pixel_values"][0]).all()) for i in range(200))
    assert 30 < red < 70


# ---------------------------------------------------------------------- the measure


def test_judge_agrees_with_a_case_worked_by_hand():
    """Codes -2, -1, 0, 1, 2 on scales of side 1 and 4; a mask of the left half, and an empty one.

    The means of the pictures are 0 and -1, and so the first tokens: 2 and 1. What is left over is 1 on the left half,
    -1 on the right (codes 3 and 1, eight times each), and 0 everywhere (code 2, 16 times).
    """
    masks = np.concatenate([half(4), np.zeros((1, 4, 4), bool)])
    found = judge(tiny_scenes.grey_tokenizer(sides=(1, 4), codes=5), masks)
    assert found.pop("entropy_per_picture") == pytest.approx(log(2) + 16 * (log(2) / 2 + log(4) / 2))
    assert found == {
        "iou": 1.0,
        "iou_per_scale": [0.5, 1.0],  # a mean of 0 is not white; the empty mask is right at once
        "entropy_per_scale": [round(log(2), 3), round(log(2) / 2 + log(4) / 2, 3)],
        "empty_share_per_scale": [1.0, 0.667],  # of 24 empty cells 16 have the same code
    }


def test_judge_of_pictures_that_are_all_alike_is_no_surprise():
    found = judge(tiny_scenes.grey_tokenizer(sides=(1, 4), codes=5), np.ones((3, 4, 4), bool))
    assert found["entropy_per_picture"] == 0 and found["entropy_per_scale"] == [0, 0]
    assert found["iou_per_scale"] == [1, 1] and np.isnan(found["empty_share_per_scale"]).all()


def test_judge_measures_masks_at_their_own_size_in_batches():
    tokenizer = tiny_scenes.grey_tokenizer(sides=(1, 2, 4), codes=17)
    masks = np.stack([np.arange(64) < edge for edge in (16, 32, 33, 48)])[:, None].repeat(64, axis=1)
    found = judge(tokenizer, masks)
    assert 0.9 < found["iou"] < 1  # 4 x 4 cells cannot show an edge at 33
    for name, value in judge(tokenizer, masks, batch_size=3).items():
        np.testing.assert_allclose(value, found[name])


# ---------------------------------------------------------------------- the codebook


def clusters(count: int = 200) -> torch.Tensor:
    """Latents (count, 2, 4, 4) of blocks that come from four noisy places, one of them most often."""
    places = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [-3.0, -3.0]])
    chosen = torch.multinomial(torch.tensor([0.7, 0.1, 0.1, 0.1]), count * 4, replacement=True).view(count, 2, 2)
    blocks = places[chosen].permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return blocks + 0.3 * torch.randn(count, 2, 4, 4)


def quantizer(rate_weight: float = 0.0) -> MultiScaleQuantizer:
    sizes = dict(image_size=4, channel_multipliers=[1], latent_channels=2, vocab_size=16, patch_nums=[1, 2, 4])
    return VARTokenizer(
        VARTokenizerConfig(norm_num_groups=0, base_channels=1, rate_weight=rate_weight, **sizes)
    ).quantize


@torch.no_grad()
def squared_error(model: MultiScaleQuantizer, latents: torch.Tensor) -> float:
    *_, found = model.accumulate(model.encode(latents))
    return float((found - latents).square().mean())


def entropy(model: MultiScaleQuantizer, latents: torch.Tensor) -> float:
    counts = torch.bincount(model.encode(latents)[:, -16:].flatten(), minlength=16)
    return float(torch.special.entr(counts / counts.sum()).sum())


def test_a_fitted_codebook_is_better_than_a_random_one_on_latents_it_has_not_seen():
    model, latents, others = quantizer(), clusters(), clusters()
    torch.nn.init.normal_(model.embedding.weight)
    before = squared_error(model, others)
    told = fit_codebook(model, latents)
    after = squared_error(model, others)
    assert after < 0.7 * before  # 16 random codes on three scales are not bad
    assert told == pytest.approx(after, rel=0.3)
    assert told < 0.1 * float(latents.var())
    assert torch.allclose(model.ema_vocab_hit_SV.sum(1), torch.ones(3))


def test_a_higher_price_makes_tokens_more_predictable():
    latents, found = clusters(), []
    for rate_weight in (0.0, 0.2, 1.0):
        torch.manual_seed(0)
        model = quantizer(rate_weight)
        fit_codebook(model, latents)
        assert model.rate_weights == [rate_weight] * 3
        found.append((entropy(model, latents), squared_error(model, latents)))
    entropies, errors = zip(*found, strict=True)
    assert entropies[0] > entropies[1] + 0.5 > entropies[2] + 1
    assert errors[0] < errors[1] < errors[2]


# ---------------------------------------------------------------------- runs


def arguments(bank, **changes) -> TokenizerArguments:
    sizes = dict(
        train_masks=40, test_masks=8, image_size=32, base_channels=4, channel_multipliers=[1, 2, 2],
        patch_nums=[1, 2, 4, 8], latent_channels=4, vocab_size=64, autoencoder_steps=FIT_AT, joint_steps=10,
        fit_pictures=64, rate_weight=[0.003],
    )  # fmt: skip
    return TokenizerArguments(bank=str(bank), **(sizes | changes))


def run(bank, output, recipe=None, **changes):
    options = dict(max_steps=STEPS, per_device_train_batch_size=8, learning_rate=5e-3, save_strategy="steps")
    training = tiny_scenes.training_arguments(output, **(options | changes))
    train_visual_tokenizer.main(arguments(bank, **(recipe or {})), training)
    return output


@pytest.fixture(scope="module")
def trained(bank_folder, tmp_path_factory):
    """A whole run, with checkpoints while it is an autoencoder, while all learns, and while the decoder alone does."""
    return run(bank_folder, tmp_path_factory.mktemp("tokenizer"), save_steps=15)


def weights(folder, part: str = "") -> dict[str, torch.Tensor]:
    state = VARTokenizer.from_pretrained(folder).state_dict()
    return {name: tensor for name, tensor in state.items() if name.startswith(part)}


def test_a_run_ends_with_a_tokenizer_that_has_learned_to_draw_masks(trained, bank_folder):
    masks = compose_masks(bank_folder, "test", 8, seed=0)
    found = judge(VARTokenizer.from_pretrained(trained), masks)
    random = judge(build(arguments(bank_folder)), masks)
    assert found["iou"] > max(0.5, random["iou"] + 0.3)
    losses = tiny_scenes.logged(trained)
    assert losses[FIT_AT] < 0.5 * losses[1]
    assert all(np.isfinite(loss) for loss in losses.values())


def test_the_evaluation_is_logged(bank_folder, tmp_path):
    run(bank_folder, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, save_steps=2)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    told = [entry for entry in state["log_history"] if "eval_iou" in entry]
    assert [entry["step"] for entry in told] == [1, 2]
    assert all(len(entry["eval_iou_per_scale"]) == 4 for entry in told)


def test_the_autoencoder_leaves_the_codes_alone(trained):
    first, second = (weights(trained / f"checkpoint-{step}") for step in (15, 30))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) == name.startswith("quantize."), name


def test_the_codes_are_fitted_once_and_then_the_rest_follows_them(trained):
    before, fitted, end = (weights(trained / f"checkpoint-{step}") for step in (30, 45, STEPS))
    assert not torch.equal(before["quantize.embedding.weight"], fitted["quantize.embedding.weight"])
    assert fitted["quantize.ema_vocab_hit_SV"].sum(1).allclose(torch.ones(4))
    for name, tensor in fitted.items():
        if name.startswith("quantize."):
            assert torch.equal(tensor, end[name]), name
    assert not torch.equal(fitted["decoder.conv_in.weight"], end["decoder.conv_in.weight"])


def test_the_decoder_can_be_trained_on_without_touching_the_codes(trained, bank_folder, tmp_path):
    recipe = {"start_from": str(trained), "decoder_only": True, "autoencoder_steps": 0}
    run(bank_folder, tmp_path, recipe, max_steps=3, save_steps=3)
    old, new = weights(trained), weights(tmp_path)
    for name, tensor in old.items():
        assert torch.equal(tensor, new[name]) == (not name.startswith(("decoder.", "post_quant_conv."))), name


@pytest.mark.parametrize("step", [30, 45])
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(trained, bank_folder, tmp_path, step):
    shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    run(bank_folder, tmp_path, save_steps=15)
    assert tiny_scenes.logged(tmp_path) == pytest.approx(tiny_scenes.logged(trained), rel=1e-5)
    torch.testing.assert_close(weights(tmp_path), weights(trained), rtol=0, atol=1e-5)


def test_scales_are_dropped_by_step_alone(trained, bank_folder):
    def trainer(seed: int, **changes):
        return train_visual_tokenizer.TokenizerTrainer(
            model=VARTokenizer.from_pretrained(trained),
            args=tiny_scenes.training_arguments(trained, seed=seed),
            recipe=arguments(bank_folder, **{"patch_nums": [1, 2, 3, 4], "scale_dropout": 0.3} | changes),
            test_masks=half(4),
        )

    def scales(one) -> list[int | None]:
        return [one.num_scales_at(step) for step in range(400)]

    found = scales(trainer(1))
    assert found == scales(trainer(1)) != scales(trainer(2))
    assert set(found) == {None, 2, 3} and 80 < 400 - found.count(None) < 160
    assert set(scales(trainer(1, scale_dropout=0.0))) == {None}
    assert [trainer(1).num_scales_at(step) for step in (-5, -1)] == [0, 0]


def test_a_run_from_an_autoencoder_keeps_its_weights_and_takes_the_new_sizes(trained, bank_folder):
    model = build(arguments(bank_folder, start_from=str(trained), vocab_size=24, rate_weight=[0.5]))
    assert model.config.vocab_size == 24 and model.quantize.rate_weights == [0.5] * 4
    state = model.state_dict()
    for name, tensor in weights(trained).items():
        assert name.startswith("quantize.") or torch.equal(tensor, state[name]), name
