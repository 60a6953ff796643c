"""The recipe of the visual tokenizer: masks, its measure, the fitted codebook, and runs of toy size."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from math import log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_scenes
import torch
from PIL import Image

from modeling_argenseg import MultiScaleQuantizer, VARTokenizer, VARTokenizerConfig
from trl_recipes import masks, train_visual_tokenizer
from trl_recipes.codebook import assign, fit_codebook, follow, revive, uses_per_picture
from trl_recipes.masks import MaskPictures, compose_masks, uniform
from trl_recipes.searched_tokens import searched_tokens
from trl_recipes.train_visual_tokenizer import TokenizerArguments, build, edge_loss, judge

ROOT = Path(__file__).parents[2]
STEPS, FIT_AT = 60, 40  # the codebook is fitted after 40 of 60 steps


# ---------------------------------------------------------------------- masks


def test_requests_for_nothing_give_no_masks(bank_folder):
    masks = compose_masks(bank_folder, "train", 60, seed=0)
    assert masks.any((1, 2)).all()


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


def test_a_cache_of_another_seed_split_or_bank_is_made_anew(bank_folder, tmp_path, capsys):
    cache, other = tmp_path / "masks.npy", tmp_path / "bank"
    shutil.copytree(bank_folder, other)
    (other / "vocabulary.json").write_text((bank_folder / "vocabulary.json").read_text() + "\n")
    first = compose_masks(bank_folder, "train", 4, seed=0, cache=cache)
    for made, told in (((bank_folder, "train", 4, 1), "seed"), ((bank_folder, "test", 4, 1), "split")):
        assert np.array_equal(compose_masks(*made, cache), compose_masks(*made))
        assert f"made with another {told}" in capsys.readouterr().out
    compose_masks(other, "test", 4, 1, cache)
    assert "another bank" in capsys.readouterr().out
    assert np.array_equal(compose_masks(bank_folder, "train", 4, seed=0, cache=cache), first)
    moved = shutil.copytree(bank_folder, tmp_path / "moved")  # the same bank
    modified = cache.stat().st_mtime_ns
    assert np.array_equal(compose_masks(moved, "train", 4, seed=0, cache=cache), first)
    assert cache.stat().st_mtime_ns == modified


def test_a_cache_that_nothing_is_said_about_is_taken_as_it_is(bank_folder, tmp_path):
    cache = tmp_path / "masks.npy"
    first = compose_masks(bank_folder, "train", 4, seed=0, cache=cache)
    cache.with_suffix(".json").unlink()
    assert np.array_equal(compose_masks(bank_folder, "train", 4, seed=1, cache=cache), first)


def test_composing_that_was_stopped_leaves_no_masks_of_another_seed(bank_folder, tmp_path, monkeypatch):
    cache = tmp_path / "masks.npy"
    compose_masks(bank_folder, "train", 4, seed=0, cache=cache)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trl_recipes.masks._preset_masks", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        compose_masks(bank_folder, "train", 4, seed=1, cache=cache)
    assert np.array_equal(compose_masks(bank_folder, "train", 4, 1, cache), compose_masks(bank_folder, "train", 4, 1))


def half(side: int) -> np.ndarray:
    """(1, side, side): the left half."""
    return np.broadcast_to(np.arange(side) < side // 2, (1, side, side))


def test_masks_are_the_same_whatever_was_cached_before(bank_folder, tmp_path):
    cache = tmp_path / "masks.npy"
    compose_masks(bank_folder, "train", 11, seed=0, cache=cache)
    alone = compose_masks(bank_folder, "train", 3, seed=0)
    for _ in range(2):
        assert np.array_equal(compose_masks(bank_folder, "train", 3, seed=0, cache=cache), alone)


def test_of_more_masks_that_were_put_there_those_of_all_presets_are_taken(bank_folder, tmp_path):
    cache = tmp_path / "masks.npy"
    masks = compose_masks(bank_folder, "train", 11, seed=0, cache=cache)
    cache.with_suffix(".json").unlink()
    assert np.array_equal(compose_masks(bank_folder, "train", 3, seed=0, cache=cache), masks[[0, 5, 10]])


@pytest.mark.parametrize("platform", ["linux", "darwin"])  # forked, and begun anew
def test_masks_are_the_same_for_any_number_of_processes(bank_folder, platform, monkeypatch):
    monkeypatch.setattr(masks, "sys", SimpleNamespace(platform=platform))
    alone, shared = (compose_masks(bank_folder, "train", 70, seed=0, workers=workers) for workers in (1, 3))
    assert np.array_equal(alone, shared)


def test_composing_ends_while_processes_are_still_handing_over():
    """Four processes that hand over more than a pipe holds, a quarter of which is wanted; by itself, to be stopped."""
    program = """
import numpy as np
from trl_recipes import masks
def large(start): return np.ones((4, 2048, 1024), np.uint8)
masks._packed_masks = large
for _ in range(5):
    assert len(masks._preset_masks(range(160), 10, 4, "masks")) == 10
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=90, cwd=ROOT)


def test_pictures_of_masks_are_black_and_white_and_depend_on_their_index_alone():
    plain = MaskPictures(half(64), 16, seed=None).batch(torch.tensor([0]))[0]
    assert plain.shape == (3, 16, 16)
    assert plain[:, :, :7].eq(1).all() and plain[:, :, 9:].eq(-1).all()
    pictures = MaskPictures(half(64), 16, seed=3).batch(torch.arange(50))
    alone = MaskPictures(half(64), 16, seed=3).batch(torch.tensor([7]))[0]
    torch.testing.assert_close(pictures[7], alone)
    assert not torch.equal(alone, MaskPictures(half(64), 16, seed=4).batch(torch.tensor([7]))[0])
    shares = (pictures > 0).float().mean((1, 2, 3))
    assert 0.3 < shares.mean() < 0.7 and shares.std() > 0.05  # zoomed
    assert 10 < (pictures[:, 0, 8, 0] < pictures[:, 0, 8, -1]).sum() < 40  # mirrored


def test_pictures_are_resized_as_by_pillow():
    masks = np.random.default_rng(0).random((6, 50, 70)) < 0.3
    pictures = MaskPictures(masks, 16, seed=2)
    drawn = uniform(2, torch.arange(6), 6).double()
    for mask, picture, (zoom, left, top, mirror, *_) in zip(masks, pictures.batch(torch.arange(6)), drawn, strict=True):
        zoom = 0.55 + 0.45 * zoom
        left, top = (1 - zoom) * left * 70, (1 - zoom) * top * 50
        image = Image.fromarray(mask).convert("L")
        box = tuple(map(float, (left, top, left + zoom * 70, top + zoom * 50)))
        wanted = np.array(image.resize((16, 16), Image.Resampling.BICUBIC, box=box)) / 127.5 - 1
        if mirror < 0.5:
            wanted = wanted[:, ::-1]
        np.testing.assert_allclose(picture[1], wanted, atol=0.02)


def test_larger_pictures_show_the_same():
    pictures, indices = MaskPictures(np.random.default_rng(0).random((3, 64, 64)) < 0.3, 16, seed=2), torch.arange(9)
    small, large = pictures.batch(indices), pictures.batch(indices, 64)
    assert large.shape == (9, 3, 64, 64)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(large, 4), small, atol=0.5, rtol=0)
    assert torch.corrcoef(torch.stack([torch.nn.functional.avg_pool2d(large, 4).ravel(), small.ravel()]))[0, 1] > 0.9


def test_random_numbers_of_indices_are_even_and_unrelated():
    drawn = uniform(1, torch.arange(20_000), 3)
    assert len(set(drawn.flatten().tolist())) > 59_000  # as many as 24 bits let one expect
    assert drawn.min() >= 0 and drawn.max() < 1
    torch.testing.assert_close(drawn.mean(0), torch.full((3,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(torch.corrcoef(drawn.T), torch.eye(3), atol=0.03, rtol=0)
    assert (torch.corrcoef(torch.stack([drawn[:, 0], uniform(2, torch.arange(20_000), 3)[:, 0]]))[0, 1]).abs() < 0.03


def test_photos_are_mixed_in_as_often_as_told(tmp_path):
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    mixed = MaskPictures(half(64), 16, 0, photos=[tmp_path / "red.png"], photo_share=0.25).batch(torch.arange(200))
    red = (mixed[:, 1] < mixed[:, 0]).all((1, 2)).sum()
    assert 30 < red < 70


def test_every_photo_comes_up(tmp_path):
    for color in ("red", "blue"):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{color}.png")
    photos = [tmp_path / "red.png", tmp_path / "blue.png"]
    mixed = MaskPictures(half(64), 16, 0, photos=photos, photo_share=1.0).batch(torch.arange(60))
    assert 15 < (mixed[:, 0] > mixed[:, 2]).all((1, 2)).sum() < 45


def test_what_is_no_picture_among_the_photos_is_told_and_left_out(bank_folder, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a_readme.txt").write_text("Photographs of mine.")
    with pytest.raises(SystemExit, match="error: --photos .* holds no picture"):
        run(bank_folder, tmp_path / "out", {"photos": str(photos)}, max_steps=2)
    Image.new("RGB", (40, 30), (255, 0, 0)).save(photos / "red.png")
    run(bank_folder, tmp_path / "out", {"photos": str(photos), "photo_share": 1.0}, max_steps=2)
    assert "1 of 2 files are no pictures, e.g. a_readme.txt" in capsys.readouterr().out


# ---------------------------------------------------------------------- the loss of edges


def test_the_loss_of_edges_is_of_the_masks_that_are_counted():
    white = torch.zeros(3, 1, 32, 32, dtype=torch.bool)
    white[:, :, 8:24, 8:24] = True
    pictures = (2 * white[:, :, ::2, ::2].float() - 1).expand(-1, 3, -1, -1).clone()
    every, good = torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True])
    assert edge_loss(pictures, white, every) < 0.1
    pictures[1] = -1.0  # nothing drawn
    assert edge_loss(pictures, white, good) < 0.1 < 1.0 < edge_loss(pictures, white, ~good)
    torch.testing.assert_close(
        edge_loss(pictures, white, every),
        (edge_loss(pictures, white, ~good) + 2 * edge_loss(pictures, white, good)) / 3,
    )
    assert edge_loss(pictures, white, ~every) == 0


def test_the_loss_of_edges_counts_a_pixel_of_a_small_mask_for_more():
    white = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    white[0, :, 10:50, 10:50], white[1, :, 20:30, 20:30] = True, True
    pictures = 2 * white[:, :, ::2, ::2].float() - 1
    pictures[:, :, 12:14, 12:14] *= -1  # a hole of the same size
    small, large = (edge_loss(pictures, white, torch.arange(2) == i) for i in (1, 0))
    assert small > 4 * large


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


def test_coding_agrees_with_the_model_and_counts_what_it_chose():
    model, latents = quantizer(0.1), clusters(30)
    fit_codebook(model, latents)
    coded, ids = assign(model, latents), model.encode(latents)
    for found, wanted in zip(coded.f_hats, model.accumulate(ids), strict=True):
        torch.testing.assert_close(found, wanted)
    assert float(coded.error) == pytest.approx(float((coded.f_hats[-1] - latents).square().sum()), rel=1e-4)
    for hits, chosen in zip(coded.hits, model.split(ids), strict=True):
        assert torch.equal(hits.long(), torch.bincount(chosen.flatten(), minlength=16))


@torch.no_grad()
def test_codes_that_follow_are_running_means_of_what_chose_them():
    model, latents = quantizer(0.1), clusters(50)
    fit_codebook(model, latents)
    old, uses = model.embedding.weight.clone(), uses_per_picture(model)
    torch.testing.assert_close(uses.sum(), torch.tensor(21.0))
    coded = assign(model, latents + 0.2)
    follow(model, coded, 50, decay=0.9)
    sums = 0.9 * uses[:, None] * old + 0.1 * coded.sums / 50
    counts = 0.9 * uses + 0.1 * coded.hits.sum(0) / 50
    used = counts > 0
    torch.testing.assert_close(model.embedding.weight[used], (sums / counts[:, None])[used])
    torch.testing.assert_close(model.embedding.weight[~used], old[~used])
    torch.testing.assert_close(uses_per_picture(model), counts)


def test_codes_that_follow_find_latents_that_have_moved():
    model, latents = quantizer(), clusters(400)
    fit_codebook(model, latents)
    before, moved = squared_error(model, latents), 1.2 * latents + 0.3
    lost = squared_error(model, moved) - 1.2**2 * before
    for part in moved.split(20) * 3:
        follow(model, assign(model, part), len(part), decay=0.8)
    assert squared_error(model, moved) - 1.2**2 * before < 0.3 * lost


@torch.no_grad()
def test_codes_that_nothing_uses_are_moved_to_vectors_that_are_badly_coded():
    model, latents = quantizer(), clusters(50)
    fit_codebook(model, latents)
    model.embedding.weight[5] = 1e3
    model.ema_vocab_hit_SV[:, 5] = 0.0
    model.embedding.weight[0] = 0.0
    before = model.embedding.weight.clone()
    revive(model, assign(model, latents))
    assert model.embedding.weight[5].norm() < 10
    poor = uses_per_picture(model) < 2e-4
    poor[0] = False
    assert torch.equal(model.embedding.weight[~poor], before[~poor])


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
    return run(bank_folder, tmp_path_factory.mktemp("tokenizer"), save_steps=5)


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


def test_the_measure_is_of_the_nearest_codes_whatever_the_configuration_says(trained, bank_folder):
    model, masks = VARTokenizer.from_pretrained(trained), compose_masks(bank_folder, "test", 8, seed=0)
    expected = str(judge(model, masks))  # as text: there are cells that are never empty, NaN
    model.config.search_steps = 8
    assert str(judge(model, masks)) == expected


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


def test_the_codes_are_fitted_then_follow_the_encoder_and_then_stay(trained):
    before, fitted, decoder = (weights(trained / f"checkpoint-{step}") for step in (30, 45, 55))
    end = weights(trained)
    assert not torch.equal(before["quantize.embedding.weight"], fitted["quantize.embedding.weight"])
    for state in (fitted, decoder):
        torch.testing.assert_close(state["quantize.ema_vocab_hit_SV"].sum(1), torch.ones(4))
    for name, tensor in decoder.items():
        still = not name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(tensor.half(), end[name].half()) == still, name
        moved = not name.startswith("quantize.quant_resi.")  # phi stays the identity
        assert torch.equal(tensor, fitted[name]) != moved, name


def test_the_decoder_can_be_trained_on_without_touching_the_codes(trained, bank_folder, tmp_path):
    recipe = {"start_from": str(trained), "decoder_only": True, "autoencoder_steps": 0}
    run(bank_folder, tmp_path, recipe, max_steps=3, save_steps=3)
    old, new = weights(trained), weights(tmp_path)
    for name, tensor in old.items():
        assert torch.equal(tensor, new[name]) == (not name.startswith(("decoder.", "post_quant_conv."))), name


@pytest.mark.parametrize("codes", ["keep", "follow"])
def test_encoder_and_decoder_can_go_on_with_the_codes_they_have(trained, bank_folder, tmp_path, codes):
    recipe = {"start_from": str(trained), "codes": codes, "autoencoder_steps": 0, "joint_steps": 6, "edge_weight": 1.0}
    run(bank_folder, tmp_path, recipe, max_steps=8, save_steps=4)
    old, new = weights(trained), weights(tmp_path)
    for name, tensor in old.items():
        stays = name.startswith("quantize.quant_resi.") or (codes == "keep" and name.startswith("quantize."))
        assert torch.equal(tensor, new[name]) == stays, name
    moved = (old["quantize.embedding.weight"] - new["quantize.embedding.weight"]).norm()
    assert moved < 0.5 * old["quantize.embedding.weight"].norm()  # fitted anew they would be others
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert 0 < next(entry["edges"] for entry in state["log_history"] if "edges" in entry) < 10


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"codes": "keep", "autoencoder_steps": 0}, "--start_from"),
        ({"decoder_only": True}, "--start_from"),
        ({"edge_weight": 1.0, "photos": "."}, "leave --photos out"),
        ({"codes": "follow", "start_from": "somewhere"}, "--autoencoder_steps 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(bank_folder, tmp_path, recipe, told):
    with pytest.raises(SystemExit, match=told):
        run(bank_folder, tmp_path, recipe)


def test_the_decoder_learns_from_tokens_that_were_searched_for(trained, bank_folder, tmp_path):
    recipe = {"start_from": str(trained), "decoder_only": True, "search_steps": 4}
    run(bank_folder, tmp_path / "searched", recipe, max_steps=12, save_steps=6)
    tokens = torch.from_numpy(np.load(tmp_path / "searched/searched_tokens.npy"))
    pictures = MaskPictures(
        compose_masks(bank_folder, "train", 40, 42, tmp_path / "searched/train_masks.npy"), 32, seed=None
    )
    model = VARTokenizer.from_pretrained(trained)
    model.decode_dtype = torch.bfloat16
    assert torch.equal(tokens[:16], model.encode(pictures.batch(torch.arange(16)), search_steps=4))
    assert (tokens != model.encode(pictures.batch(torch.arange(40)))).any()
    run(bank_folder, tmp_path / "plain", recipe | {"search_steps": 0}, max_steps=12, save_steps=6)
    old, searched, plain = (weights(folder) for folder in (trained, tmp_path / "searched", tmp_path / "plain"))
    for name, tensor in old.items():
        still = not name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(tensor, searched[name]) == still, name
        assert torch.equal(plain[name], searched[name]) == still, name
    (tmp_path / "again").mkdir()
    for name in ("searched_tokens.npy", "checkpoint-6"):
        copy = shutil.copytree if (tmp_path / "searched" / name).is_dir() else shutil.copy
        copy(tmp_path / "searched" / name, tmp_path / "again" / name)
    run(bank_folder, tmp_path / "again", recipe, max_steps=12, save_steps=6)
    torch.testing.assert_close(weights(tmp_path / "again"), searched, rtol=0, atol=1e-5)


def stripes(count: int) -> np.ndarray:
    """(count, 32, 32): the left half, moved on and on."""
    return np.stack([np.roll(half(32)[0], place, axis=1) for place in range(count)])


def test_a_search_that_was_stopped_finds_what_is_missing(trained, tmp_path, monkeypatch):
    model, pictures = VARTokenizer.from_pretrained(trained), MaskPictures(stripes(40), 32, seed=None)
    whole = searched_tokens(model, pictures, 2, tmp_path / "whole.npy")
    encode, calls = model.encode, []

    def stopped_after_one(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*args, **kwargs)

    monkeypatch.setattr(model, "encode", stopped_after_one)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt) if len(calls) < 2 else nullcontext():
            found = searched_tokens(model, pictures, 2, tmp_path / "tokens.npy")
    assert torch.equal(found, whole) and len(calls) == 4 and model.decode_dtype is None
    assert torch.equal(searched_tokens(model, pictures, 2, tmp_path / "tokens.npy"), whole) and len(calls) == 4
    fewer = searched_tokens(model, MaskPictures(stripes(8), 32, seed=None), 2, tmp_path / "tokens.npy")
    assert fewer.shape == (8, whole.shape[1])
    with pytest.raises(ValueError, match="seed=None"):
        searched_tokens(model, MaskPictures(stripes(8), 32, seed=1), 2, tmp_path / "other.npy")


def test_tokens_of_another_tokenizer_search_or_masks_are_begun_anew(trained, tmp_path):
    masks, cache = stripes(8), tmp_path / "tokens.npy"
    old, new = (VARTokenizer.from_pretrained(folder) for folder in (trained / "checkpoint-45", trained))
    cases = ((old, 2, masks), (new, 2, masks), (new, 8, masks), (new, 8, ~masks))
    for number, (model, steps, shown) in enumerate(cases):
        pictures = MaskPictures(shown, 32, seed=None)
        expected = searched_tokens(model, pictures, steps, tmp_path / f"{number}.npy")
        assert torch.equal(searched_tokens(model, pictures, steps, cache), expected)


@pytest.mark.parametrize("recipe", [{}, {"decoder_only": True, "photos": "."}])
def test_searching_is_for_masks_and_the_decoder(bank_folder, tmp_path, recipe):
    with pytest.raises(SystemExit, match="goes with --decoder_only"):
        run(bank_folder, tmp_path, {"search_steps": 4} | recipe)


@pytest.mark.parametrize("step", [30, 40, 45])
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(trained, bank_folder, tmp_path, step):
    shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    run(bank_folder, tmp_path, save_steps=10)
    assert tiny_scenes.logged(tmp_path) == pytest.approx(tiny_scenes.logged(trained), rel=1e-5)
    torch.testing.assert_close(weights(tmp_path), weights(trained), rtol=0, atol=1e-5)


def test_a_finished_run_stays_as_it_is(trained, bank_folder, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    run(bank_folder, tmp_path / "run")
    assert "the run is finished at step" in capsys.readouterr().out
    checkpoints = [sorted(path.name for path in one.glob("checkpoint-*")) for one in (trained, tmp_path / "run")]
    assert checkpoints[0] == checkpoints[1]
    torch.testing.assert_close(weights(tmp_path / "run"), weights(trained), rtol=0, atol=0)


def test_scales_are_dropped_by_step_alone(trained, bank_folder):
    def trainer(seed: int, **changes):
        return train_visual_tokenizer.TokenizerTrainer(
            model=VARTokenizer.from_pretrained(trained),
            args=tiny_scenes.training_arguments(trained, seed=seed),
            recipe=arguments(bank_folder, **{"scale_dropout": 0.3} | changes),
            test_masks=half(4),
            pictures=MaskPictures(half(4), 16, seed=None),
        )

    def scales(one) -> list[int]:
        return [count for step in range(4) for count in one.num_scales_at(step, 100).tolist()]

    found = scales(trainer(1))
    assert found == scales(trainer(1)) != scales(trainer(2))
    assert set(found) == {4, 2, 3} and 80 < 400 - found.count(4) < 160
    assert set(scales(trainer(1, scale_dropout=0.0))) == {4}
    two = trainer(1)
    two.model.config.patch_nums = [1, 4]  # as of a tokenizer that it went on from, whatever the recipe says
    assert set(scales(two)) == {2}  # the first scale alone draws nothing


GOING_ON = {"autoencoder_steps": 0, "codes": "keep"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GOING_ON | {"patch_nums": [1, 4]}, r"--patch_nums \[1, 4\]: the tokenizer of --start_from has"),
        (GOING_ON | {"rate_weight": [0.7]}, r"--rate_weight \[0\.7\]"),
        (GOING_ON | {"image_size": 64}, "--image_size 64"),
        ({"decoder_only": True, "vocab_size": 9}, "--vocab_size 9"),
        ({"latent_channels": 5}, "--latent_channels 5"),
    ],
)
def test_the_sizes_of_a_tokenizer_that_a_run_goes_on_from_stay(trained, bank_folder, options, message):
    recipe = TokenizerArguments(str(bank_folder), start_from=str(trained), **options)
    with pytest.raises(ValueError, match=message):
        build(recipe)


def test_they_need_not_be_said_again(trained, bank_folder):
    recipe = TokenizerArguments(str(bank_folder), start_from=str(trained), **GOING_ON)
    config = build(recipe).config
    assert (recipe.image_size, recipe.patch_nums) == (config.image_size, config.patch_nums) == (32, [1, 2, 4, 8])


def test_autocast_is_for_the_network(trained, bank_folder):
    """Which is called in parts: `accelerate` would do it for `forward` alone."""
    args = tiny_scenes.training_arguments(trained, bf16=True)
    pictures = MaskPictures(half(4), 32, seed=None)
    trainer = train_visual_tokenizer.TokenizerTrainer(
        model=VARTokenizer.from_pretrained(trained), args=args, recipe=arguments(bank_folder, decoder_only=True),
        test_masks=half(4), pictures=pictures,
    )  # fmt: skip
    found = set()
    for part in (trainer.model.encoder.conv_in, trainer.model.decoder.conv_in):
        part.register_forward_hook(lambda module, given, out: found.add(out.dtype))
    trainer.compute_loss(trainer.model, {"indices": torch.arange(4)})
    assert found == {torch.bfloat16}


def test_a_run_from_an_autoencoder_keeps_its_weights_and_takes_the_new_sizes(trained, bank_folder):
    model = build(arguments(bank_folder, start_from=str(trained), vocab_size=24, rate_weight=[0.5]))
    assert model.config.vocab_size == 24 and model.quantize.rate_weights == [0.5] * 4
    state = model.state_dict()
    for name, tensor in weights(trained).items():
        assert name.startswith("quantize.") or torch.equal(tensor, state[name]), name


def test_the_learning_rate_rises_and_falls_in_each_phase(trained):
    rates = [tiny_scenes.logged(trained, "learning_rate")[step] for step in range(1, STEPS + 1)]
    for start, end in ((0, FIT_AT), (FIT_AT, FIT_AT + 10), (FIT_AT + 10, STEPS)):
        phase = rates[start:end]
        assert max(phase) > 0.9 * 5e-3 and phase[-1] < 0.15 * 5e-3
        top = phase.index(max(phase))
        assert phase[:top] == sorted(phase[:top]) and phase[top:] == sorted(phase[top:], reverse=True)


def test_a_run_whose_time_is_short_goes_through_all_phases(trained, bank_folder, tmp_path, monkeypatch):
    clock = iter(range(10_000))  # a second passes whenever it is looked at
    monkeypatch.setattr("trl_recipes.clock.time", SimpleNamespace(monotonic=lambda: next(clock)))
    run(bank_folder, tmp_path, {"minutes": 0.5}, save_steps=1)
    rates = tiny_scenes.logged(tmp_path, "learning_rate")
    assert 10 <= max(rates) <= 31  # and not 60
    assert rates[max(rates)] < 0.3 * 5e-3 < 0.8 * 5e-3 < max(rates.values())
    assert weights(tmp_path)["quantize.ema_vocab_hit_SV"].sum(1).allclose(torch.ones(4), atol=1e-2)  # the codes' phase
    first, last = weights(tmp_path / f"checkpoint-{max(rates) - 2}"), weights(tmp_path / f"checkpoint-{max(rates)}")
    assert torch.equal(first["encoder.conv_in.weight"], last["encoder.conv_in.weight"])  # the decoder's phase
