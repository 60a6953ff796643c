"""The model against numbers made by the official code, at the tolerances of the fixture's README."""

from types import SimpleNamespace

import pytest
import torch

from modeling_argenseg.conversion_argenseg import convert_state_dict, revert_state_dict

T, FIRST_VISUAL, GEN_START, GEN_END, END = 680, 293, 290, 291, 271
ID_MARGIN = 1e-3  # ids whose runner-up is nearer than this may differ


def assert_near(actual, expected, atol):
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=0)


def assert_same_ids(actual, expected, margin):
    clear = margin > ID_MARGIN
    assert clear.float().mean() > 0.99 and torch.equal(actual[clear], expected[clear])


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request, golden):
    return golden.model(request.param)


def stream_of_training(golden):
    """The official sample, with the visual ids where the official code writes placeholders, and its labels."""
    ids = golden["train/input_ids"].clone()
    start = int((ids[0] == GEN_START).nonzero()[0, 0])
    ids[0, start + 1 : start + T + 1] = golden["train/mask_token_ids"][0] + FIRST_VISUAL
    labels = torch.where(golden["train/labels_filled"] == -100, -100, ids)
    assert torch.equal(labels, golden["train/labels_filled"]), "labels are the stream itself"
    return ids, labels, start


def test_round_trip_of_the_released_layout(golden, golden_tokenizer, model):
    native = model.state_dict()
    back = revert_state_dict(native, golden_tokenizer.state_dict(), model.config)
    assert back.keys() == golden.released.keys()
    assert all(torch.equal(back[key], golden.released[key]) for key in back)
    again = convert_state_dict(back, model.config)
    assert again.keys() == native.keys() and all(torch.equal(again[key], native[key]) for key in native)


def test_conversion_refuses_unknown_names(golden):
    with pytest.raises(KeyError, match="not a name of the released"):
        convert_state_dict({"language_model.model.layers.0.attention.wq.weight": torch.zeros(1)}, golden.config())


def test_image_features(golden, model):
    with torch.no_grad():
        features = model.get_image_features(golden["vit/pixel_values"])
    assert_near(features.last_hidden_state, golden["vit/last_hidden_state"], 1e-4)
    assert_near(features.pooler_output, golden["vit/image_embeds"], 1e-4)


@pytest.fixture(scope="module")
def training(golden, model):
    ids, labels, start = stream_of_training(golden)
    model.train().zero_grad()
    outputs = model(
        input_ids=ids,
        pixel_values=golden["vit/pixel_values"],
        attention_mask=golden["train/attention_mask"],
        labels=labels,
        skip_logits=False,
    )
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.eval().zero_grad()
    return SimpleNamespace(ids=ids, start=start, outputs=outputs, gradients=gradients, logits=outputs.logits[0])


class TestTraining:
    def test_losses(self, golden, training):
        for ours, theirs in (("text_loss", "text_loss"), ("visual_loss", "gen_loss"), ("loss", "loss")):
            assert getattr(training.outputs, ours).item() == pytest.approx(golden.meta["train"][theirs], abs=1e-4)

    @pytest.mark.parametrize(
        "ours, theirs",
        [
            ("model.scale_embedding.weight", "lvl_embed.weight"),
            ("model.generation_projector.0.weight", "word_embed.weight"),
            ("model.vlm.multi_modal_projector.linear_2.weight", "mlp1.3.weight"),
        ],
    )
    def test_gradients(self, golden, training, ours, theirs):
        expected = golden[f"train/grad/{theirs}"]
        torch.testing.assert_close(
            training.gradients[ours], expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3
        )

    def test_all_gradient_norms(self, golden, model, training):
        frozen = [name for name, gradient in training.gradients.items() if gradient is None]
        assert frozen and all(name.startswith("model.quantizer.") for name in frozen)
        learned = {name: gradient for name, gradient in training.gradients.items() if gradient is not None}
        norms = {name: g.norm().item() for name, g in revert_state_dict(learned, {}, model.config).items()}
        expected = golden.meta["train"]["grad_norms"]
        assert norms.keys() == expected.keys()
        assert norms == pytest.approx(expected, rel=1e-3)

    def test_inputs_of_the_picture(self, golden, model, training):
        with torch.no_grad():
            embeds = model.model.embed_stream(training.ids)
            gen_end = model.get_input_embeddings()(torch.tensor(GEN_END))
        span = embeds[0, training.start : training.start + T]
        assert_near(span, golden["train/inputs_embeds_ge_span"], 1e-4)
        assert torch.equal(embeds[0, training.start + T], gen_end)

    def test_visual_logits(self, golden, training):
        at = golden["train/visual_logit_positions"]
        assert at.tolist() == list(range(training.start, training.start + T))
        visual = training.logits[at, FIRST_VISUAL:].detach()
        top = visual.topk(2).values
        assert_near(visual[:, :64], golden["train/visual_logits_first64"], 5e-4)
        assert_near(visual.logsumexp(-1), golden["train/visual_logsumexp"], 5e-4)
        assert_near(training.logits[at].detach().logsumexp(-1), golden["train/full_logsumexp_at_visual"], 5e-4)
        assert_near(top[:, 0] - top[:, 1], golden["train/visual_margin"], 5e-4)
        assert_same_ids(visual.argmax(-1), golden["train/visual_argmax"], golden["train/visual_margin"])

    def test_text_logits(self, golden, training):
        logits = training.logits[golden["train/text_logit_positions"]].detach()
        assert_near(logits[:, :FIRST_VISUAL], golden["train/text_logits"], 5e-4)
        assert_near(logits.logsumexp(-1), golden["train/text_full_logsumexp"], 5e-4)


def drawn_ids(answer):
    return answer[answer >= FIRST_VISUAL] - FIRST_VISUAL


def assert_answer(answer, generated_ids):
    """Ours holds `<gen_start>` and the picture where the official ids hold `<ge_end>`."""
    at = generated_ids.index(GEN_END)
    assert answer[: at + 1].tolist() == [*generated_ids[:at], GEN_START]
    assert answer[at + 1 + T :].tolist() == generated_ids[at + 1 :]


def visual_logits_of_span(model, ids, mask, answer, pixel_values=None):
    """Teacher-forced logits (T, V) of the picture in `answer`, and the inputs (T, hidden) it was read from."""
    stream = torch.cat([ids, answer[None]], dim=1)
    mask = torch.cat([mask, torch.ones_like(answer)[None]], dim=1)
    start = ids.shape[1] + int((answer == GEN_START).nonzero()[0, 0])
    with torch.no_grad():
        logits = model(stream, pixel_values=pixel_values, attention_mask=mask).logits
        embeds = model.model.embed_stream(stream)
    return logits[0, start : start + T, FIRST_VISUAL:], embeds[0, start : start + T]


def assert_picture(golden, golden_tokenizer, case, ids):
    """Visual ids to f_hat, picture and 8-bit mask."""
    f_hats = torch.cat(list(golden_tokenizer.quantize.accumulate(ids)))
    assert_near(f_hats, golden[f"{case}/f_hats"], 1e-4)
    assert_near(f_hats[-1:], golden[f"{case}/f_hat_last"], 1e-4)
    picture = golden_tokenizer.decode(ids)
    assert_near(picture, golden[f"{case}/image_last"], 1e-3)
    mask_u8 = ((picture + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1)
    off = (mask_u8.int() - golden[f"{case}/mask_u8"].int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3


@pytest.fixture(scope="module")
def inference(golden, model):
    ids, mask = golden["infer/input_ids"], golden["infer/attention_mask"]
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=golden["vit/pixel_values"],
        max_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


class TestInference:
    def test_text_around_the_picture(self, golden, inference):
        prompt = golden["infer/input_ids"]
        assert torch.equal(inference.sequences[:, : prompt.shape[1]], prompt)
        assert_answer(inference.sequences[0, prompt.shape[1] :], [86, 35, GEN_END, 49, END])
        assert golden["infer/generated_ids"].tolist() == [[86, 35, GEN_END, 49, END]]

    def test_text_logits(self, golden, inference):
        assert len(inference.logits) == 5
        assert_near(inference.logits[0][0], golden["infer/prefill_logits_last"], 5e-4)
        top = torch.cat(inference.logits).topk(2).values
        assert_near(top[:, 0] - top[:, 1], golden["infer/text_margin"][0], 1e-3)

    def test_visual_ids_and_picture(self, golden, golden_tokenizer, inference):
        ids = drawn_ids(inference.sequences[0])[None]
        assert_same_ids(ids, golden["infer/visual_ids"], golden["infer/visual_margin"])
        assert_picture(golden, golden_tokenizer, "infer", ids)

    def test_visual_logits_cached_and_teacher_forced(self, golden, model, inference):
        prompt, mask = golden["infer/input_ids"], golden["infer/attention_mask"]
        answer = inference.sequences[0, prompt.shape[1] :]
        visual, embeds = visual_logits_of_span(model, prompt, mask, answer, golden["vit/pixel_values"])
        assert_near(embeds, golden["infer/visual_inputs_embeds"][0], 1e-4)
        assert_near(visual[:, :8], golden["infer/visual_logits_first8"][0], 5e-4)
        assert_near(visual.logsumexp(-1), golden["infer/visual_logsumexp"][0], 5e-4)
        assert_same_ids(visual.argmax(-1), drawn_ids(answer), golden["infer/visual_margin"][0])
        logprobs = visual.log_softmax(-1).gather(-1, drawn_ids(answer)[:, None])[:, 0]
        assert_near(inference.picture_token_logprobs[0][0], logprobs, 1e-4)


@pytest.fixture(scope="module")
def guidance(golden, model):
    ids, mask = golden["cfg/input_ids"], golden["cfg/attention_mask"]
    return model.generate(
        input_ids=ids[:1],
        attention_mask=mask[:1],
        negative_input_ids=ids[1:],
        negative_attention_mask=mask[1:],
        pixel_values=golden["vit/pixel_values"],
        picture_guidance_scale=golden.meta["cfg"]["cfg"],
        max_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
    )


class TestGuidance:
    def test_text_and_visual_ids(self, golden, golden_tokenizer, guidance):
        answer = guidance.sequences[0, golden["cfg/input_ids"].shape[1] :]
        assert guidance.sequences.shape[0] == 1
        assert_answer(answer, golden["cfg/generated_ids"][0].tolist())
        ids = drawn_ids(answer)[None]
        assert_same_ids(ids, golden["cfg/visual_ids"], golden["cfg/visual_margin"])
        assert_picture(golden, golden_tokenizer, "cfg", ids)

    def test_guided_logits(self, golden, model, guidance):
        ids, mask, pixels = golden["cfg/input_ids"], golden["cfg/attention_mask"], golden["vit/pixel_values"]
        answer = guidance.sequences[0, ids.shape[1] :]
        conditional, embeds = visual_logits_of_span(model, ids[:1], mask[:1], answer, pixels)
        unconditional, _ = visual_logits_of_span(model, ids[1:], mask[1:], answer)
        sizes = torch.tensor(model.config.patch_nums).square()
        t = (4 * torch.arange(10) / 9).repeat_interleave(sizes)[:, None]
        guided = (1 + t) * conditional - t * unconditional
        assert_near(embeds, golden["cfg/visual_inputs_embeds"][0], 1e-4)
        assert_near(guided[:, :8], golden["cfg/visual_logits_first8"][0], 1e-3)
        assert_near(guided.logsumexp(-1), golden["cfg/visual_logsumexp"][0], 1e-3)
        logprobs = guided.log_softmax(-1).gather(-1, drawn_ids(answer)[:, None])[:, 0]
        assert_near(guidance.picture_token_logprobs[0][0], logprobs, 5e-4)
