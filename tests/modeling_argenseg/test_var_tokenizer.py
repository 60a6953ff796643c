"""The multi-scale VQ-VAE: against the official numbers, and its behaviour at toy size."""

import pytest
import torch
from tiny import CODES, SIDES, T, tokenizer_config, visual_tokenizer
from torch.nn import functional as F
from transformers import AutoModel

from modeling_argenseg import MultiScaleQuantizer, VARTokenizer, VARTokenizerConfig, var_quantizer
from modeling_argenseg.var_quantizer import SharedPhi


def square(count: int = 2, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_phi_table_of_ten_scales():
    assert SharedPhi.nearest_ticks(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_default_config_is_the_released_one():
    config = VARTokenizerConfig()
    assert config.num_tokens == 680
    assert config.scale_starts == [0, 1, 5, 14, 30, 55, 91, 155, 255, 424]


class TestGolden:
    @pytest.fixture
    def pixels(self, golden):
        return (golden["vae/image_u8"].float() * 2 / 255 - 1).permute(2, 0, 1)[None]

    def test_latent_and_ids(self, golden, golden_tokenizer, pixels):
        with torch.no_grad():
            latent = golden_tokenizer.latent(pixels)
        torch.testing.assert_close(latent, golden["vae/encoder_f"], atol=1e-4, rtol=0)
        assert torch.equal(golden_tokenizer.encode(pixels), golden["vae/ids"])

    def test_masks_of_the_training_sample(self, golden, golden_tokenizer):
        pixels = (golden["train/masks_u8"].float() * 2 / 255 - 1)[:, None].expand(-1, 3, -1, -1)
        assert torch.equal(golden_tokenizer.encode(pixels), golden["train/mask_token_ids"])

    def test_f_hats_and_reconstruction(self, golden, golden_tokenizer):
        ids = golden["vae/ids"]
        f_hats = torch.cat(list(golden_tokenizer.quantize.accumulate(ids)))
        torch.testing.assert_close(f_hats, golden["vae/f_hats"], atol=1e-4, rtol=0)
        picture = golden_tokenizer.decode(ids)
        torch.testing.assert_close(picture, golden["vae/recon_last"].float(), atol=1e-3, rtol=0)

    @pytest.mark.parametrize("ids, inputs", [("vae/ids", "vae/var_input"), ("train/mask_token_ids", "train/var_input")])
    def test_teacher_forcing_inputs(self, golden, golden_tokenizer, ids, inputs):
        features = golden_tokenizer.next_scale_inputs(golden[ids])
        torch.testing.assert_close(features, golden[inputs], atol=1e-4, rtol=0)


def test_encode_then_decode_shapes_and_one_decoder_pass():
    model = visual_tokenizer()
    passes = []
    model.decoder.register_forward_hook(lambda module, args, output: passes.append(output.shape))
    ids = model.encode(square(3))
    assert ids.shape == (3, T) and ids.unique().numel() > CODES // 4 and not passes
    picture = model.decode(ids)
    assert picture.shape == (3, 3, 16, 16) and len(passes) == 1
    assert picture.min() >= -1 and picture.max() <= 1 and picture.std() > 0.01


def test_decode_scales_is_decode_of_each_prefix():
    model = visual_tokenizer()
    ids = model.encode(square(2))
    pictures = model.decode_scales(ids)
    assert pictures.shape == (2, len(SIDES), 3, 16, 16)
    ends = torch.tensor(SIDES).square().cumsum(0).tolist()
    for scale, end in enumerate(ends):
        torch.testing.assert_close(pictures[:, scale], model.decode(ids[:, :end]))
    torch.testing.assert_close(model.decode_scales(ids[:, : ends[1]]), pictures[:, :2])
    assert (pictures[:, -1] - pictures[:, 0]).abs().max() > 0.01


def test_next_scale_inputs_are_area_resized_f_hats():
    model = visual_tokenizer()
    ids = model.encode(square(2))
    f_hats = list(model.quantize.accumulate(ids))
    by_hand = [F.adaptive_avg_pool2d(f, side).flatten(2).mT for f, side in zip(f_hats, SIDES[1:], strict=False)]
    torch.testing.assert_close(model.next_scale_inputs(ids), torch.cat(by_hand, dim=1))
    assert model.next_scale_inputs(ids[:, :1]).shape == (2, 0, 8)
    assert torch.equal(model.next_scale_inputs(ids[:, :5]), model.next_scale_inputs(ids)[:, :4])


@pytest.mark.parametrize("length", [0, 2, 4, 6, T - 1, T + 1])
@pytest.mark.parametrize("method", ["decode", "decode_scales", "next_scale_inputs"])
def test_a_stream_cut_inside_a_scale_is_refused(method, length):
    with pytest.raises(ValueError, match="cut inside a scale"):
        getattr(visual_tokenizer(), method)(torch.zeros(1, length, dtype=torch.long))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3, 16, 32), (3, 16, 16)])
def test_pictures_of_the_wrong_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \(B, 3, 16, 16\)"):
        visual_tokenizer().encode(torch.zeros(shape))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_nums": (1, 2, 3, 8)}, "as fine as the latent"),
        ({"image_size": 32}, "as fine as the latent"),
        ({"image_size": 18, "patch_nums": (1, 2, 4)}, "as fine as the latent"),
        ({"patch_nums": (1, 3, 2, 4)}, "coarse to fine"),
        ({"rate_weight": [0.1, 0.2]}, "2 numbers for"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_config(**changes)


@pytest.mark.parametrize("rate_weight", [0.0, 0.5, 3.0])
def test_code_choice_minimises_distance_plus_rate(rate_weight):
    quantizer = visual_tokenizer(rate_weight=rate_weight).quantize
    quantizer.ema_vocab_hit_SV.copy_(torch.rand(len(SIDES), CODES) ** 4)
    rest, codes = torch.randn(200, 8), quantizer.embedding.weight.detach()
    for scale in range(len(SIDES)):
        hits = quantizer.ema_vocab_hit_SV[scale] + 1e-3
        cost = torch.cdist(rest, codes).square() - rate_weight * (hits / hits.sum()).log()
        assert torch.equal(quantizer.nearest(rest, scale), cost.argmin(1))


@pytest.mark.parametrize("rate_weight, chosen", [(0.0, [3, 3, 7]), (0.1, [7, 3, 7])])
def test_rate_decides_near_ties_only(rate_weight, chosen):
    quantizer = MultiScaleQuantizer(tokenizer_config(rate_weight=rate_weight))
    codes = torch.full((CODES, 8), 100.0)
    codes[3], codes[7] = 1.0, -1.0
    quantizer.embedding.weight.data.copy_(codes)
    quantizer.ema_vocab_hit_SV[:, 7], quantizer.ema_vocab_hit_SV[:, 3] = 0.9, 0.1
    near_tie, clear_3, clear_7 = 0.001 * torch.ones(8), 0.9 * torch.ones(8), -0.9 * torch.ones(8)
    assert quantizer.nearest(torch.stack([near_tie, clear_3, clear_7]), 0).tolist() == chosen


def test_each_scale_may_have_its_own_price():
    rates = [0.0, 0.5, 1.0, 3.0]
    priced = visual_tokenizer(rate_weight=rates).quantize
    priced.ema_vocab_hit_SV.copy_(torch.rand(len(SIDES), CODES) ** 4)
    rest, chosen = torch.randn(200, 8), []
    for scale, rate in enumerate(rates):
        plain = visual_tokenizer(rate_weight=rate).quantize
        plain.load_state_dict(priced.state_dict())
        chosen.append(priced.nearest(rest, scale))
        assert torch.equal(chosen[-1], plain.nearest(rest, scale))
    assert not torch.equal(chosen[0], chosen[-1])


def test_a_side_may_come_twice_and_the_second_pass_codes_what_was_left():
    torch.manual_seed(0)
    model = visual_tokenizer(patch_nums=(1, 2, 4, 4)).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    model.quantize.embedding.weight.data[0] = 0  # so that no pass makes it worse
    ids = model.encode(square(2))
    assert ids.shape == (2, 1 + 4 + 16 + 16) and model.decode(ids).shape == (2, 3, 16, 16)
    f, f_hats = model.latent(square(2)), list(model.quantize.accumulate(ids))
    errors = [(f - f_hat).square().sum() for f_hat in f_hats]
    assert errors[3] < errors[2]
    assert torch.equal(model.next_scale_inputs(ids)[:, -16:], f_hats[2].flatten(2).transpose(1, 2))


def test_a_call_gives_tokens_and_what_they_say():
    model = visual_tokenizer()
    out = model(square(2))
    assert torch.equal(out.visual_ids, model.encode(square(2)))
    assert torch.equal(out.reconstruction, model.decode(out.visual_ids)) and not out.reconstruction.requires_grad
    picture, ids = model(square(2), return_dict=False)
    assert torch.equal(picture, out.reconstruction) and torch.equal(ids, out.visual_ids)


def test_areas_that_an_apple_gpu_cannot_make_are_made_on_the_cpu(monkeypatch):
    """Its areas must divide the picture, which 16 cells of the paper's scales do not."""
    values, asked = torch.randn(1, 2, 4, 4), set()
    plain = {side: var_quantizer.area(values, side) for side in (2, 3)}

    class OnMPS(torch.Tensor):
        device = torch.device("mps")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    real = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, **options: asked.add(type(x)) or real(x, **options))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
    for side, kind in ((2, OnMPS), (3, torch.Tensor)):
        asked.clear()
        assert torch.equal(var_quantizer.area(values.as_subclass(OnMPS), side).as_subclass(torch.Tensor), plain[side])
        assert asked == {kind}


def test_save_and_load(tmp_path):
    model = visual_tokenizer(rate_weight=0.3)
    model.quantize.ema_vocab_hit_SV.copy_(torch.rand(len(SIDES), CODES))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is VARTokenizer and not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert torch.equal(model.encode(square()), loaded.encode(square()))
    assert loaded.config.patch_nums == list(SIDES) and loaded.config.rate_weight == 0.3


@pytest.mark.parametrize("groups, local", [(0, True), (4, False)])
def test_without_norm_and_attention_a_corner_leaves_the_far_corner_alone(groups, local):
    # one scale only: the 1x1 scale of a pyramid sums up all of the picture, whatever the encoder does
    sizes = {"image_size": 64, "channel_multipliers": (1, 1, 1), "patch_nums": (16,), "use_attention": False}
    model = visual_tokenizer(norm_num_groups=groups, **sizes)
    for module in model.modules():  # blocks that begin as the identity would make this too easy
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    pixels = square(1, size=64)
    changed = pixels.clone()
    changed[..., :8, :8] = 1.0
    with torch.no_grad():
        moved = (model.latent(pixels) - model.latent(changed)).abs().amax((0, 1))  # (16, 16)
    assert moved[0, 0] > 1e-3
    assert (moved[-2:, -2:].max() < 1e-6) == local
    same = (model.encode(pixels) == model.encode(changed)).view(16, 16)
    assert not same.all()
    if local:
        assert same[-2:, -2:].all()


@pytest.mark.parametrize("norm_num_groups, zero", [(0, True), (4, False)])
def test_blocks_without_a_norm_start_as_the_identity(norm_num_groups, zero):
    model = visual_tokenizer(norm_num_groups=norm_num_groups)
    block = model.encoder.mid.block_1
    hidden = torch.randn(1, block.conv1.in_channels, 4, 4)
    assert torch.equal(block(hidden), hidden) == zero


def test_a_faster_decoder_leaves_tokens_alone():
    model = visual_tokenizer()
    ids = torch.randint(CODES, (2, T))
    pictures = torch.randn(2, 3, 16, 16).clamp(-1, 1)
    codes, plain, scales = model.encode(pictures), model.decode(ids), model.decode_scales(ids)
    kinds = set()
    model.decoder.conv_in.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    model.decode_dtype = torch.bfloat16
    faster = model.decode(ids)
    assert kinds == {torch.bfloat16} and faster.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(faster, plain, atol=0.1, rtol=0.1)
    assert not torch.equal(faster, plain) and torch.equal(model.encode(pictures), codes)
    torch.testing.assert_close(model.decode_scales(ids), scales, atol=0.1, rtol=0.1)
    model.decode_dtype = None
    assert torch.equal(model.decode(ids), plain)


@pytest.mark.parametrize("groups", [0, 4])
def test_decoding_without_gradients_is_the_same(groups):
    """Activations are then overwritten where nothing else needs them."""
    model = visual_tokenizer(norm_num_groups=groups)
    f_hat = torch.randn(1, 8, 4, 4)
    kept = f_hat.clone()
    with torch.no_grad():
        without = model.decode_latent(f_hat)
    torch.testing.assert_close(without, model.decode_latent(f_hat).detach())
    assert torch.equal(f_hat, kept)
