"""Options and outputs of generation: text, sampling, guidance, what is returned and what is refused."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import (
    CAT,
    CODES,
    DOG,
    DONE,
    EOS,
    FIRST_VISUAL,
    GEN_END,
    GEN_START,
    IMAGE,
    PAD,
    PROMPTS,
    SIDES,
    SURE,
    TEXTS,
    WORDS,
    T,
    answers,
    drawn,
    generate,
    images_of,
    left_padded,
    starts_of,
    stream,
    visual_logits,
)
from transformers import AutoModelForImageTextToText, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from modeling_argenseg import ARGenSegForConditionalGeneration, ARGenSegGenerateOutput

SIZES = [side * side for side in SIDES]
both_attentions = pytest.mark.parametrize("scale_attention", ["causal", "block"])


class TestText:
    @pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5}, {"do_sample": True, "top_p": 0.3}])
    def test_visual_ids_are_never_text(self, options):
        """The visual rows of the head outshout all words; the text must still be text, sampled or not."""
        net = tiny.model()
        with torch.no_grad():
            net.lm_head.weight[FIRST_VISUAL : FIRST_VISUAL + CODES] *= 30
        prompts = left_padded(PROMPTS[1:3])
        assert drawn(net(**prompts).logits[:, -1].argmax(-1).tolist())
        out = net.generate(**prompts, max_new_tokens=20, eos_token_id=None, **options)
        net.model.find_pictures(out)  # raises if a visual id stands outside a picture
        text = [[t for t in row[3:].tolist() if not drawn([t])] for row in out]
        assert all(len(row) >= 20 and GEN_END not in row for row in text)

    def test_gen_end_is_never_text(self):
        net, prompt = tiny.model(), left_padded([PROMPTS[1]])
        logits = net(**prompt).logits[0, -1].detach().clone()
        logits[GEN_END : FIRST_VISUAL + CODES] = -torch.inf
        best = int(logits.argmax())
        with torch.no_grad():
            net.lm_head.weight[GEN_END] = 10 * net.lm_head.weight[best]
        assert net(**prompt).logits[0, -1].argmax() == GEN_END
        assert net.generate(**prompt, max_new_tokens=1, do_sample=False)[0, 2] == best

    def test_sampled_text(self):
        net, prompt = tiny.model(), left_padded(PROMPTS[1:3])
        greedy = net.generate(**prompt, max_new_tokens=8, do_sample=False)
        assert torch.equal(net.generate(**prompt, max_new_tokens=8, do_sample=True, top_k=1), greedy)
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(net.generate(**prompt, max_new_tokens=8, do_sample=True, temperature=2.0, eos_token_id=None))
        assert torch.equal(runs[0], runs[1])
        assert runs[0].shape != runs[2].shape or not torch.equal(runs[0], runs[2])

    def test_streamer_gets_text_only(self):
        class Collect(BaseStreamer):
            def __init__(self):
                self.chunks, self.ended = [], 0

            def put(self, value):
                self.chunks.append(value.flatten().tolist())

            def end(self):
                self.ended += 1

        streamer = Collect()
        generate(tiny.model(), left_padded([PROMPTS[1]]), [SURE, GEN_START, DONE], streamer=streamer)
        assert streamer.chunks == [PROMPTS[1][0].tolist(), [SURE], [GEN_START], [DONE], [EOS]] and streamer.ended == 1

    @pytest.mark.parametrize("options", [{"min_new_tokens": 9}, {"min_length": 3 + 9}])
    def test_the_least_length_is_of_text_in_a_batch_too(self, options):
        net = tiny.model()
        net.generation_config.update(eos_token_id=[*WORDS[::2], EOS])  # half of the words end an answer
        with torch.no_grad():
            net.lm_head.weight[GEN_START] = 3 * net.lm_head.weight[GEN_START]
        prompts = left_padded(PROMPTS[1:3])
        out = net.generate(**prompts, max_new_tokens=30, do_sample=False, **options)
        drew = 0
        for row, prompt in enumerate(PROMPTS[1:3]):
            length = {"min_length": prompt.shape[1] + 9} if "min_length" in options else options
            alone = net.generate(prompt, max_new_tokens=30, do_sample=False, **length)
            found = [answers(one, at)[place] for one, at, place in ((out, 3, row), (alone, prompt.shape[1], 0))]
            assert found[0] == found[1] and len(found[0]) - len(drawn(found[0])) >= 9
            drew += len(drawn(found[0]))
        assert drew


class TestSampledPictures:
    def test_seeds(self):
        net, runs = tiny.model(), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            out = generate(net, left_padded([PROMPTS[1]]), [GEN_START], picture_do_sample=True)
            runs.append(drawn(out.sequences[0].tolist()))
        assert runs[0] == runs[1] != runs[2] and len(runs[2]) == T

    @pytest.mark.parametrize("limit", [{"picture_top_k": 1}, {"picture_top_p": 1e-6}, {"picture_temperature": 1e-4}])
    def test_the_narrowest_sampling_is_greedy(self, limit):
        net, prompts = tiny.model(), left_padded(PROMPTS[1:3])
        texts = ([GEN_START], [SURE, GEN_START])
        greedy = generate(net, prompts, *texts).sequences
        sampled = generate(net, prompts, *texts, picture_do_sample=True, **limit).sequences
        assert torch.equal(sampled, greedy)
        assert not torch.equal(generate(net, prompts, *texts, picture_do_sample=True).sequences, greedy)

    @pytest.mark.parametrize("options", [{}, {"picture_temperature": 3.0}, {"picture_top_k": 3}])
    def test_frequencies_are_the_softmax(self, options):
        net, count = tiny.model(num_scales=1), 4000
        prompt = stream(CAT, DOG, GEN_START)
        logits = net(prompt).logits[0, -1, FIRST_VISUAL : FIRST_VISUAL + CODES].detach()
        logits = logits / options.get("picture_temperature", 1.0)
        lowest = logits.topk(options.get("picture_top_k", CODES)).values[-1]
        expected = logits.masked_fill(logits < lowest, -torch.inf).softmax(-1)
        out = net.generate(
            prompt.expand(count, -1), picture_do_sample=True, max_new_tokens=1, do_sample=False, **options
        )
        frequency = torch.bincount(out[:, 3] - FIRST_VISUAL, minlength=CODES) / count
        assert (frequency - expected).abs().sum() / 2 < 0.05 and expected.max() < 0.9

    def test_several_answers_with_several_images_each(self):
        net = tiny.model()
        prompts = [stream(IMAGE, CAT, IMAGE), stream(IMAGE, DOG, DOG, IMAGE)]
        images = tiny.images(4)
        options = {"do_sample": True, "num_return_sequences": 2}  # a script leaves one word to sample from
        texts = [[SURE, GEN_START], [GEN_START, DONE]]
        out = generate(
            net, left_padded(prompts), texts[0], texts[0], texts[1], texts[1], pixel_values=images, **options
        )
        rows = answers(out.sequences, 4)
        assert rows[0] == rows[1] and rows[2] == rows[3] and len(out.picture_scores) == 4
        for row in range(2):
            own = images[2 * row : 2 * row + 2]
            alone = generate(net, left_padded([prompts[row]]), texts[row], pixel_values=own)
            assert answers(alone.sequences, prompts[row].shape[1]) == [rows[2 * row]]
        sampled = generate(
            net,
            left_padded(prompts[:1]),
            texts[0],
            texts[0],
            pixel_values=images[:2],
            picture_do_sample=True,
            **options,
        )
        assert not torch.equal(sampled.sequences[0], sampled.sequences[1])


class TestLogitAdjustment:
    def test_without_recorded_usage_nothing_changes(self):
        net, prompt = tiny.model(), left_padded([PROMPTS[1]])
        net.model.quantizer.ema_vocab_hit_SV.zero_()
        plain = generate(net, prompt, [GEN_START, DONE])
        adjusted = generate(net, prompt, [GEN_START, DONE], picture_logit_adjustment=5.0)
        assert torch.equal(plain.sequences, adjusted.sequences)

    def test_the_commonest_code_gives_way(self):
        net, prompt = tiny.model(), left_padded([PROMPTS[1]])
        plain = generate(net, prompt, [GEN_START, DONE])
        (start,) = starts_of(plain.sequences[0])
        first = plain.sequences[0, start + 1] - FIRST_VISUAL
        net.model.quantizer.ema_vocab_hit_SV[0] = F.one_hot(first, net.config.visual_vocab_size).float()
        adjusted = generate(net, prompt, [GEN_START, DONE], picture_logit_adjustment=5.0)
        logits = visual_logits(net, adjusted.sequences[0], start)[0].clone()
        logits[first] = -torch.inf
        assert adjusted.sequences[0, start + 1] - FIRST_VISUAL == logits.argmax() != first

    def test_log_probabilities_are_those_of_the_model_itself(self):
        net, prompt = tiny.model(), left_padded([PROMPTS[1]])
        net.model.quantizer.ema_vocab_hit_SV.copy_(torch.rand(len(SIDES), CODES) ** 4)
        out = generate(net, prompt, [GEN_START, DONE], picture_logit_adjustment=1.0)
        (start,) = starts_of(out.sequences[0])
        ids = out.sequences[0, start + 1 : start + 1 + T] - FIRST_VISUAL
        logprobs = visual_logits(net, out.sequences[0], start).log_softmax(-1)
        assert not torch.equal(logprobs.argmax(-1), ids)
        chosen = logprobs.gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(out.picture_token_logprobs[0][0], chosen, atol=1e-4, rtol=1e-4)


def test_an_image_that_was_forgotten():
    net, prompts = tiny.model(), left_padded([PROMPTS[0]])
    with pytest.raises(ValueError, match="holds an image, and none came: pass pixel_values"):
        generate(net, prompts, TEXTS[0])
    read = net(**prompts, **images_of(0), use_cache=True).past_key_values
    read.crop(-1)
    expected = generate(net, prompts, TEXTS[0], **images_of(0))
    assert torch.equal(generate(net, prompts, TEXTS[0], past_key_values=read).sequences, expected.sequences)


class TestGuidance:
    NEGATIVE = left_padded([stream(6, 5)])
    GIVEN = {"negative_input_ids": NEGATIVE["input_ids"], "negative_attention_mask": NEGATIVE["attention_mask"]}

    def test_zero_is_off(self):
        net, prompt = tiny.model(), left_padded([PROMPTS[1]])
        plain = generate(net, prompt, [SURE, GEN_START, DONE])
        off = generate(net, prompt, [SURE, GEN_START, DONE], picture_guidance_scale=0.0, **self.GIVEN)
        assert torch.equal(plain.sequences, off.sequences) and plain.picture_scores == off.picture_scores

    def test_needs_negative_prompts(self):
        with pytest.raises(ValueError, match="pass negative_input_ids"):
            generate(tiny.model(), left_padded([PROMPTS[1]]), [GEN_START], picture_guidance_scale=2.0)

    def test_every_prompt_needs_its_own(self):
        with pytest.raises(ValueError, match="got 2 prompts and 1 unconditional ones"):
            generate(tiny.model(), left_padded(PROMPTS[1:3]), *TEXTS[1:3], picture_guidance_scale=2.0, **self.GIVEN)

    def test_both_prompts_open_the_picture_or_neither(self):
        opened = torch.cat([PROMPTS[1], stream(GEN_START)], 1)
        with pytest.raises(ValueError, match="both end in <gen_start>"):
            generate(tiny.model(), left_padded([opened]), [DONE], picture_guidance_scale=2.0, **self.GIVEN)

    @both_attentions
    @pytest.mark.parametrize("negative", [stream(6), stream(6, 5, 7, 8, 9, 6, 5, 7)], ids=["shorter", "longer"])
    @pytest.mark.parametrize("prefilled", [False, True])
    def test_guided_logits_by_teacher_forcing(self, scale_attention, negative, prefilled):
        net, prompt, text = tiny.model(scale_attention=scale_attention), PROMPTS[0], [SURE, GEN_START, DONE]
        if prefilled:
            begun = stream(*text[:2])
            prompt, negative, text = torch.cat([prompt, begun], 1), torch.cat([negative, begun], 1), text[2:]
        out = generate(
            net, left_padded([prompt]), text, **images_of(0), picture_guidance_scale=3.0, negative_input_ids=negative
        )
        assert out.sequences.shape[0] == 1
        assert torch.equal(out.sequences[:, : prompt.shape[1]], prompt)
        sequence, length = out.sequences[0], prompt.shape[1]
        (start,) = starts_of(sequence)
        conditional = visual_logits(net, sequence, start, **images_of(0))
        other = torch.cat([negative[0], sequence[length:]])
        unconditional = visual_logits(net, other, start - length + negative.shape[1])
        t = (3.0 * torch.arange(4) / 3).repeat_interleave(torch.tensor(SIZES))[:, None]
        guided = (1 + t) * conditional - t * unconditional
        ids = sequence[start + 1 : start + 1 + T] - FIRST_VISUAL
        assert torch.equal(guided.argmax(-1), ids) and not torch.equal(conditional.argmax(-1), ids)
        logprobs = guided.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(out.picture_token_logprobs[0][0], logprobs, atol=5e-4, rtol=1e-3)

    def test_ragged_batch_equals_single_rows(self):
        net, prompts, texts = tiny.model(), PROMPTS[:3], TEXTS[:3]
        negatives = [stream(6, 5, 7, 8, 9, 6, 5), stream(7), stream(8, 8)]
        both = left_padded(negatives)
        out = generate(
            net, left_padded(prompts), *texts, **images_of(0), picture_guidance_scale=2.0,
            negative_input_ids=both["input_ids"], negative_attention_mask=both["attention_mask"],
        )  # fmt: skip
        together = answers(out.sequences, 5)
        for row in range(3):
            alone = generate(
                net, left_padded([prompts[row]]), texts[row], **images_of(row), picture_guidance_scale=2.0,
                negative_input_ids=negatives[row],
            )  # fmt: skip
            assert answers(alone.sequences, prompts[row].shape[1]) == [together[row]]
        plain = generate(net, left_padded(prompts), *texts, **images_of(0))
        assert not torch.equal(out.sequences, plain.sequences)

    def test_options_may_come_in_a_generation_config(self):
        net, prompt = tiny.model(), left_padded([PROMPTS[1]])
        options = {"picture_guidance_scale": 3.0, "max_new_tokens": 12, "do_sample": False}
        given = generate(net, prompt, [GEN_START], **options, **self.GIVEN)
        config = GenerationConfig(**options, pad_token_id=PAD, eos_token_id=EOS, return_dict_in_generate=True)
        script = [tiny.Script(2, [GEN_START])]
        held = net.generate(**prompt, **self.GIVEN, generation_config=config, logits_processor=script)
        assert torch.equal(given.sequences, held.sequences)
        net.generation_config.picture_guidance_scale = 3.0
        assert torch.equal(generate(net, prompt, [GEN_START], **self.GIVEN).sequences, given.sequences)
        plain = generate(net, prompt, [GEN_START], picture_guidance_scale=0.0)  # a call overrides the model
        assert not torch.equal(plain.sequences, given.sequences)


class TestOutputs:
    def test_fields(self):
        net, prompts = tiny.model(), left_padded(PROMPTS[1:3])
        out = generate(net, prompts, TEXTS[1], TEXTS[2], output_scores=True, output_logits=True)
        assert isinstance(out, ARGenSegGenerateOutput)
        assert len(out.scores) == len(out.logits) == 10  # five until row 1 ends, three to the second picture, two
        assert all(step.shape == (2, tiny.VOCAB) for step in out.scores + out.logits)
        assert [len(row) for row in out.picture_scores] == [2, 0]
        assert [[one.shape for one in row] for row in out.picture_token_logprobs] == [[(T,), (T,)], []]
        for score, logprobs in zip(out.picture_scores[0], out.picture_token_logprobs[0], strict=True):
            means = [scale.mean() for scale in logprobs.split(SIZES)]
            assert score == pytest.approx(torch.stack(means).mean().exp().item())
            assert 0 < score < 1
        plain = generate(net, prompts, TEXTS[1], TEXTS[2])
        assert plain.scores is None and plain.logits is None
        bare = generate(net, prompts, TEXTS[1], TEXTS[2], return_dict_in_generate=False)
        assert isinstance(bare, torch.Tensor) and torch.equal(bare, out.sequences)

    def test_a_preview_scores_by_its_own_scales(self):
        out = generate(tiny.model(), left_padded([PROMPTS[1]]), [GEN_START], picture_stop_at_scale=2)
        means = [scale.mean() for scale in out.picture_token_logprobs[0][0].split(SIZES[:2])]
        assert out.picture_scores[0] == [pytest.approx(torch.stack(means).mean().exp().item())]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_preview_in_half_precision(self, dtype):
        out = generate(tiny.model().to(dtype), left_padded([PROMPTS[1]]), [GEN_START], picture_stop_at_scale=2)
        assert len(out.picture_token_logprobs[0][0]) == sum(SIZES[:2])

    def test_a_preview_of_a_head_with_an_adapter_around_it(self):
        net = tiny.model()
        expected = generate(net, left_padded([PROMPTS[1]]), [GEN_START], picture_stop_at_scale=2)
        adapted = get_peft_model(net, LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [1]}))
        found = generate(adapted, left_padded([PROMPTS[1]]), [GEN_START], picture_stop_at_scale=2)
        assert torch.equal(found.sequences, expected.sequences)

    def test_a_certain_picture_scores_one(self):
        net = tiny.model()
        with torch.no_grad():
            net.lm_head.weight[FIRST_VISUAL : FIRST_VISUAL + CODES] *= 1000
        out = generate(net, left_padded([PROMPTS[1]]), [GEN_START])
        assert out.picture_scores[0][0] == pytest.approx(1.0, abs=1e-2)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"use_cache": False}, "leave use_cache=True"),
            ({"num_beams": 2}, "only supports"),
            ({"synced_gpus": True}, "synced_gpus"),
            ({"output_attentions": True}, "does not collect"),
            ({"output_hidden_states": True}, "does not collect"),
            ({"picture_stop_at_scale": 5}, "from 1 to 4"),
            ({"picture_stop_at_scale": 0}, "from 1 to 4"),
            ({"picture_stop_at_scale": 2.0}, "from 1 to 4"),
            ({"picture_prefill": "sometimes"}, "one of"),
            ({"picture_prefill": "always"}, "picture_answer_ids"),
            ({"picture_answer_ids": [SURE]}, "once"),
            ({"picture_answer_ids": [GEN_START, DONE, GEN_START]}, "once"),
            ({"exponential_decay_length_penalty": (2, 1.5)}, "exponential_decay_length_penalty would count"),
            ({"forced_eos_token_id": EOS}, "forced_eos_token_id would count"),
            ({"guidance_scale": 1.5}, "guidance_scale is for text.*picture_guidance_scale"),
        ],
    )
    def test_what_is_not_supported_is_said(self, options, message):
        net = tiny.model(attention="eager")
        with pytest.raises(ValueError, match=message):
            generate(net, left_padded([PROMPTS[1]]), [GEN_START], **options)

    def test_nothing_is_kept_between_calls(self, tmp_path):
        net, prompts = tiny.model(), left_padded(PROMPTS)
        own = [net, net.model, net.model.quantizer, net.model.generation_projector]
        before = [set(vars(module)) for module in own]
        config, generation_config = net.config.to_dict(), net.generation_config.to_dict()
        options = {"picture_top_k": 5, "picture_temperature": 0.7}
        first = generate(net, prompts, *TEXTS, **images_of(0, 3), **options)
        second = generate(net, prompts, *TEXTS, **images_of(0, 3))
        assert torch.equal(first.sequences, second.sequences) and first.picture_scores == second.picture_scores
        assert [set(vars(module)) for module in own] == before
        assert net.config.to_dict() == config and net.generation_config.to_dict() == generation_config
        net.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        third = generate(loaded, prompts, *TEXTS, **images_of(0, 3))
        assert torch.equal(first.sequences, third.sequences)
        ids = first.sequences
        net.train()(ids, labels=ids, pixel_values=tiny.images(2)).loss.backward()  # nothing left in inference mode


def test_transition_scores_are_of_text():
    net = tiny.model()
    prompt = {"input_ids": PROMPTS[1]}
    words = generate(net, prompt, [SURE, DOG], output_scores=True)
    found = net.compute_transition_scores(words.sequences, words.scores)
    assert found.tolist() == [[0.0, 0.0, 0.0]]
    picture = generate(net, prompt, [SURE, GEN_START, DONE], output_scores=True)
    with pytest.raises(ValueError, match="picture_token_logprobs"):
        net.compute_transition_scores(picture.sequences, picture.scores)


def test_a_prompt_with_a_picture_is_not_read_in_chunks():
    net, ids = tiny.model(), PROMPTS[3]
    with pytest.raises(ValueError, match="prefill_chunk_size would cut the pictures"):
        net.generate(ids, **images_of(3), prefill_chunk_size=4, max_new_tokens=2)


def test_options_as_transformers_writes_them():
    net, prompt = tiny.model(), {"input_ids": PROMPTS[1]}
    drawing = {"picture_answer_ids": [SURE, GEN_START, DONE, EOS], "picture_prefill": "always", "max_new_tokens": 4}
    expected = net.generate(**prompt, **drawing)
    ids = torch.tensor(drawing["picture_answer_ids"])
    for other in (ids, ids.numpy(), ids[None]):
        assert torch.equal(net.generate(**prompt, **drawing | {"picture_answer_ids": other}), expected)
    sampled = []
    for options in ({"picture_top_k": 0, "picture_temperature": None}, {}):
        torch.manual_seed(0)
        sampled.append(net.generate(**prompt, **drawing, picture_do_sample=True, **options))
    assert torch.equal(*sampled)


@pytest.mark.parametrize("made_from", ["a configuration", "a VLM", "a folder"])
def test_options_of_pictures_are_saved_with_the_model(tmp_path, made_from):
    net = tiny.model()
    if made_from != "a configuration":
        net = ARGenSegForConditionalGeneration.from_vlm(tiny.internvl_config(), tiny.visual_tokenizer())
    if made_from == "a folder":
        net.save_pretrained(tmp_path / "first")
        net = AutoModelForImageTextToText.from_pretrained(tmp_path / "first")
    net.generation_config.picture_guidance_scale, net.generation_config.picture_top_k = 2.0, 5
    net.save_pretrained(tmp_path / "saved")
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").generation_config
    assert (config.picture_guidance_scale, config.picture_top_k) == (2.0, 5)


def test_words_do_not_look_for_pictures(monkeypatch):
    """A step of text is one token, and none of a picture: nothing waits for the GPU to know that."""
    net, asked = tiny.model(), []
    find = type(net.model).find_pictures
    monkeypatch.setattr(type(net.model), "find_pictures", lambda self, ids: asked.append(ids.shape) or find(self, ids))
    generate(net, {"input_ids": PROMPTS[1]}, [SURE, DOG, CAT, GEN_START, DONE])
    assert asked and all(length > 1 for _, length in asked)


def test_embeddings_are_no_prompt():
    net = tiny.model()
    embeds = net.get_input_embeddings()(PROMPTS[1])
    with pytest.raises(ValueError, match="pass input_ids: pictures are found by their ids"):
        net.generate(inputs_embeds=embeds, max_new_tokens=2)


@both_attentions
def test_criteria_are_asked_after_a_picture_too(scale_attention):
    """One row stops with its picture, the other goes on; padding is the end of text."""
    net = tiny.model(scale_attention=scale_attention)

    class AfterAPicture(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            is_visual = net.config.is_visual(input_ids)
            return is_visual[:, -1] & (is_visual.sum(-1) == T)

    prompts, texts = left_padded(PROMPTS[1:3]), [[SURE, GEN_START, DONE], [DONE, SURE]]
    options = {"stopping_criteria": StoppingCriteriaList([AfterAPicture()]), "pad_token_id": EOS}
    plain, stopped = (
        generate(net, prompts, *texts, **({"pad_token_id": EOS} | more)).sequences for more in ({}, options)
    )
    length = prompts["input_ids"].shape[1]
    whole, found = (answers(one, length, pad=EOS) for one in (plain, stopped))
    assert found[0] == whole[0][: 2 + T] and whole[0][2 + T :] == [DONE]
    assert found[1] == whole[1]
