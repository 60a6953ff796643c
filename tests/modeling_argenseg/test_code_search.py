"""Tokens that are found by decoding them: what they gain, and what they leave alone."""

from pathlib import Path

import pytest
import torch
from tiny import CODES, SIDES, visual_tokenizer
from torch.nn import functional as F

from modeling_argenseg import VARTokenizer, VARTokenizerConfig, code_search

LAST = SIDES[-1] ** 2


def blobs(count: int = 4, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Black and white pictures (count, 3, size, size)."""
    noise = torch.randn(count, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=size, mode="bicubic").sign().expand(-1, 3, -1, -1).contiguous()


def pixel_loss(model: VARTokenizer, ids: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (B,) of each decoded picture, read as a mask of twice its side."""
    with torch.no_grad():
        *_, f_hat = model.quantize.accumulate(ids)
        decoded = F.interpolate(model.decode_latent(f_hat).mean(1, keepdim=True), scale_factor=2, mode="bilinear")
    white = F.interpolate(pictures[:, :1], scale_factor=2, mode="bicubic") > 0
    return F.binary_cross_entropy_with_logits(16 * decoded, white.float(), reduction="none").mean((1, 2, 3))


def local_tokenizer(seed: int = 0) -> VARTokenizer:
    """Without normalisation and attention, as the default model's: what is wrong in a cell is due to cells near it."""
    return visual_tokenizer(seed, norm_num_groups=0, use_attention=False)


def test_it_mends_tokens_of_the_last_scale_and_no_others():
    model, pictures = local_tokenizer(), blobs()
    plain, searched = model.encode(pictures), model.encode(pictures, search_steps=16)
    assert torch.equal(searched[:, :-LAST], plain[:, :-LAST])
    assert (searched[:, -LAST:] != plain[:, -LAST:]).any(1).all()
    assert (pixel_loss(model, searched, pictures) < 0.8 * pixel_loss(model, plain, pictures)).all()


def test_more_steps_are_better():
    model, pictures = local_tokenizer(), blobs(8)
    means = [pixel_loss(model, model.encode(pictures, steps), pictures).mean().item() for steps in (0, 4, 16, 64)]
    assert means == sorted(means, reverse=True) and means[3] < 0.9 * means[1]


def test_it_comes_near_to_trying_every_token():
    model, picture = local_tokenizer(), blobs(1)
    searched = model.encode(picture, 64)
    best = pixel_loss(model, searched, picture).item()
    for place in range(-LAST, 0):
        others = searched.repeat(CODES, 1)
        others[:, place] = torch.arange(CODES)
        best = min(best, pixel_loss(model, others, picture.expand(CODES, -1, -1, -1)).min().item())
    plain = pixel_loss(model, model.encode(picture), picture).item()
    assert plain - pixel_loss(model, searched, picture).item() > 0.8 * (plain - best)


@pytest.mark.parametrize("seed", range(3))
def test_no_picture_is_made_worse_where_a_cell_changes_the_whole_picture(seed):
    model = visual_tokenizer(seed)  # group normalisation and attention, as released
    pictures = blobs(6, seed=seed)
    plain, searched = model.encode(pictures), model.encode(pictures, search_steps=12)
    assert (pixel_loss(model, searched, pictures) <= pixel_loss(model, plain, pictures) + 1e-6).all()
    assert not torch.equal(searched, plain)


def test_a_picture_does_not_depend_on_its_batch():
    model, pictures = local_tokenizer(), blobs(3)
    together = model.encode(pictures, search_steps=8)
    assert torch.equal(together, torch.cat([model.encode(one[None], search_steps=8) for one in pictures]))


def test_flat_pictures_that_are_right_stay_as_they_are():
    model = local_tokenizer()
    torch.nn.init.zeros_(model.decoder.conv_out.weight)
    torch.nn.init.constant_(model.decoder.conv_out.bias, -30.0)  # black, whatever the tokens
    black = -torch.ones(2, 3, 16, 16)
    assert torch.equal(model.encode(black, search_steps=4), model.encode(black))


def test_rare_codes_must_be_worth_their_price(monkeypatch):
    monkeypatch.setattr(code_search, "RATE_WEIGHT", 0.5)  # much is wrong in the pictures of random weights
    model, pictures = local_tokenizer(), blobs(8)
    free = model.encode(pictures, search_steps=32)
    frequency = torch.rand(CODES).pow(12) + 1e-6
    model.quantize.ema_vocab_hit_SV.copy_((frequency / frequency.sum()).expand(len(SIDES), -1))
    priced = model.encode(pictures, search_steps=32)
    surprise = -model.quantize.log_frequency(len(SIDES) - 1)
    assert surprise[priced[:, -LAST:]].mean() < 0.95 * surprise[free[:, -LAST:]].mean()
    assert pixel_loss(model, priced, pictures).mean() < pixel_loss(model, model.encode(pictures), pictures).mean()


def test_half_precision():
    model, pictures = local_tokenizer().to(torch.bfloat16), blobs(4)
    searched, plain = (model.encode(pictures.to(torch.bfloat16), steps) for steps in (16, 0))
    model.float()
    assert pixel_loss(model, searched, pictures).mean() < 0.9 * pixel_loss(model, plain, pictures).mean()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_in_every_gradient_mode_and_leaves_no_gradients(mode):
    model, pictures = local_tokenizer(), blobs(2)
    expected = model.encode(pictures, search_steps=4)
    with mode():
        assert torch.equal(model.encode(pictures.clone(), search_steps=4), expected)
    assert not expected.requires_grad and all(parameter.grad is None for parameter in model.parameters())


def test_the_configuration_says_how_long(tmp_path):
    model, pictures = local_tokenizer(), blobs(2)
    assert VARTokenizerConfig().search_steps == 0
    assert torch.equal(model.encode(pictures, search_steps=0), model.encode(pictures))
    model.config.search_steps = 8
    model.save_pretrained(tmp_path)
    again = VARTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(pictures), model.encode(pictures, search_steps=8))
    assert not torch.equal(again.encode(pictures), model.encode(pictures, search_steps=0))


def test_nothing_to_encode_and_negative_steps():
    model = local_tokenizer()
    assert model.encode(blobs(1)[:0], search_steps=4).shape == (0, model.config.num_tokens)
    with pytest.raises(ValueError, match="search_steps must be 0"):
        model.encode(blobs(1), search_steps=-1)


def test_a_single_scale():
    model = visual_tokenizer(patch_nums=(4,), norm_num_groups=0, use_attention=False)
    pictures = blobs(2)
    plain, searched = model.encode(pictures), model.encode(pictures, search_steps=8)
    assert (pixel_loss(model, searched, pictures) < pixel_loss(model, plain, pictures)).all()


def test_the_default_model_keeps_more_of_a_thin_thing():
    folder = Path(__file__).parents[2] / "hub_cards/argenseg-tiny/visual_tokenizer"
    model = VARTokenizer.from_pretrained(folder)
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    ring = ((x - 70).square() + (y - 60).square()).sqrt().sub(30).abs() < 2.5
    picture = torch.where(ring, 1.0, -1.0).expand(1, 3, -1, -1)

    def iou(ids: torch.Tensor) -> float:
        drawn = model.decode(ids)[0].mean(0) > 0
        return ((drawn & ring).sum() / (drawn | ring).sum()).item()

    plain, searched = (iou(model.encode(picture, search_steps=steps)) for steps in (0, 16))
    assert searched > plain + 0.02 and searched > 0.96
