"""Generation is exact: against teacher forcing, against single rows, and in what it computes and counts."""

import pytest
import tiny
import torch
from tiny import (
    CAT,
    DOG,
    DONE,
    EOS,
    FIRST_VISUAL,
    GEN_END,
    GEN_START,
    PAD,
    PROMPTS,
    SIDES,
    SURE,
    TEXTS,
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
from transformers import StoppingCriteria, StoppingCriteriaList

from modeling_argenseg.cache_name import CACHE
from modeling_argenseg.var_layers import Decoder

SIZES = [side * side for side in SIDES]
EVERY_ATTENTION = [(scale, kind) for scale in ("causal", "block") for kind in ("eager", "sdpa")]
both_attentions = pytest.mark.parametrize("scale_attention", ["causal", "block"])
every_attention = pytest.mark.parametrize("scale_attention, attention", EVERY_ATTENTION)


class Calls:
    """Lengths of the language model's inputs, and how often head, vision tower and any VAR decoder ran."""

    def __init__(self, net):
        self.lengths, self.head, self.vision, self.decoder = [], [], 0, 0
        model = net.model
        model.language_model.register_forward_pre_hook(self.on_language_model, with_kwargs=True)
        net.lm_head.register_forward_pre_hook(lambda module, args: self.head.append(args[0].shape[1]))
        model.vlm.vision_tower.register_forward_pre_hook(self.on_vision, with_kwargs=True)

    def on_language_model(self, module, args, kwargs):
        self.lengths.append(kwargs["inputs_embeds"].shape[1])

    def on_vision(self, module, args, kwargs):
        self.vision += 1


class TestExact:
    def test_the_toy_model_would_show_a_mistake(self):
        """Ids must depend on the prompt, on the position and on the attention, or the tests below prove nothing."""
        runs = []
        for row, scale_attention in ((0, "causal"), (3, "causal"), (0, "block")):
            net = tiny.model(scale_attention=scale_attention)
            out = generate(net, left_padded([PROMPTS[row]]), [SURE, GEN_START], **images_of(row))
            runs.append(drawn(out.sequences[0, PROMPTS[row].shape[1] :].tolist()))
        assert all(len(set(run)) >= 5 for run in runs)
        for a, b in ((0, 1), (0, 2)):
            assert sum(x != y for x, y in zip(runs[a], runs[b], strict=True)) > T // 4

    def test_pictures_are_drawn_under_autocast(self):
        net = tiny.model()
        with torch.autocast("cpu", torch.bfloat16):
            out = generate(net, left_padded([PROMPTS[0]]), [SURE, GEN_START], **images_of(0))
        assert len(drawn(out.sequences[0, PROMPTS[0].shape[1] :].tolist())) == T

    @every_attention
    def test_cached_logits_equal_teacher_forced_logits(self, scale_attention, attention):
        net = tiny.model(scale_attention=scale_attention, attention=attention)
        prompt, text = PROMPTS[3], [SURE, GEN_START, DONE, SURE, GEN_START, CAT]
        out = generate(net, left_padded([prompt]), text, **images_of(3), output_logits=True)
        (sequence,) = out.sequences
        logits = net(sequence[None], **images_of(3)).logits[0]
        written = [i for i, t in enumerate(sequence) if i >= prompt.shape[1] and not drawn([int(t)])]
        assert sequence[written].tolist() == [*text, EOS] and len(out.logits) == len(written)
        for step, at in enumerate(written):
            torch.testing.assert_close(out.logits[step][0], logits[at - 1], atol=1e-4, rtol=1e-4)
        starts = starts_of(sequence, after=prompt.shape[1])
        assert len(starts) == len(out.picture_token_logprobs[0]) == 2
        for start, logprobs in zip(starts, out.picture_token_logprobs[0], strict=True):
            visual = visual_logits(net, sequence, start, **images_of(3))
            ids = sequence[start + 1 : start + 1 + T] - FIRST_VISUAL
            assert torch.equal(visual.argmax(-1), ids)
            chosen = visual.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            torch.testing.assert_close(logprobs, chosen, atol=1e-4, rtol=1e-4)

    @every_attention
    def test_batch_equals_single_rows(self, scale_attention, attention):
        net = tiny.model(scale_attention=scale_attention, attention=attention)
        prompts = left_padded(PROMPTS)
        out = generate(net, prompts, *TEXTS, **images_of(0, 3))
        together = answers(out.sequences, prompts["input_ids"].shape[1])
        assert torch.equal(out.sequences[:, : prompts["input_ids"].shape[1]], prompts["input_ids"])
        assert [answer.count(GEN_START) for answer in together] == [1, 2, 0, 1]
        for row, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
            alone = generate(net, left_padded([prompt]), text, **images_of(row))
            assert answers(alone.sequences, prompt.shape[1]) == [together[row]]
            assert [t for t in together[row] if not drawn([t])] == [*text, EOS]
            assert out.picture_scores[row] == pytest.approx(alone.picture_scores[0], abs=1e-4)
            for a, b in zip(out.picture_token_logprobs[row], alone.picture_token_logprobs[0], strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

    @both_attentions
    @pytest.mark.parametrize("end", [[DOG, CAT], [DOG, CAT, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]], ids=["EOS", "budget"])
    def test_a_row_may_wait_while_the_last_writer_ends(self, scale_attention, end):
        net = tiny.model(scale_attention=scale_attention)
        sequences = generate(net, left_padded(PROMPTS[1:3]), [GEN_START, DONE], end).sequences
        assert sequences.shape[1] == 3 + 1 + T + 2  # as wide as the longest answer
        together = answers(sequences, 3)
        alone = generate(net, left_padded([PROMPTS[1]]), [GEN_START, DONE])
        assert answers(alone.sequences, 2) == together[:1]

    @both_attentions
    def test_text_after_waiting_reads_the_same_logits(self, scale_attention):
        """Row 0 waits for row 1 with a gap in its cache; its text logits must not know."""
        net = tiny.model(scale_attention=scale_attention)
        prompts, texts = PROMPTS[1:3], [[GEN_START, DONE, CAT], [SURE, SURE, SURE, GEN_START, DONE, CAT]]
        out = generate(net, left_padded(prompts), *texts, output_logits=True)
        alone = [generate(net, left_padded([p]), t, output_logits=True) for p, t in zip(prompts, texts, strict=True)]
        # steps of the batch in which row 0 writes: the first, then those after both have drawn
        for step, own in ((0, 0), (4, 1), (5, 2), (6, 3)):
            torch.testing.assert_close(out.logits[step][0], alone[0].logits[own][0], atol=1e-4, rtol=1e-4)
        for step, logits in enumerate(alone[1].logits):
            torch.testing.assert_close(out.logits[step][1], logits[0], atol=1e-4, rtol=1e-4)

    @every_attention
    def test_left_padding_changes_nothing(self, scale_attention, attention):
        net = tiny.model(scale_attention=scale_attention, attention=attention)
        tight, loose = left_padded([PROMPTS[3]]), left_padded([PROMPTS[3]], extra=5)
        runs = [generate(net, prompt, TEXTS[1], **images_of(3)) for prompt in (tight, loose)]
        assert torch.equal(runs[0].sequences, runs[1].sequences[:, 5:])
        assert runs[0].picture_scores[0] == pytest.approx(runs[1].picture_scores[0], abs=1e-5)

    @both_attentions
    def test_a_picture_in_the_history_is_read(self, scale_attention):
        net = tiny.model(scale_attention=scale_attention)
        other = PROMPTS[3].clone()
        other[0, 3 : 3 + T] = tiny.pictures(1, seed=5)
        first, second = (
            generate(net, left_padded([prompt]), [GEN_START], **images_of(3), output_logits=True)
            for prompt in (PROMPTS[3], other)
        )
        assert (first.logits[0] - second.logits[0]).abs().max() > 1e-2

    @both_attentions
    def test_a_prefilled_start_equals_the_free_run(self, scale_attention):
        net = tiny.model(scale_attention=scale_attention)
        text = [SURE, GEN_START, DONE, CAT]
        free = generate(net, left_padded([PROMPTS[0]]), text, **images_of(0))
        prefilled = left_padded([torch.cat([PROMPTS[0], stream(SURE, GEN_START)], dim=1)])
        out = generate(net, prefilled, text[2:], **images_of(0))
        assert torch.equal(out.sequences, free.sequences)
        assert out.picture_scores[0] == pytest.approx(free.picture_scores[0], abs=1e-5)

    def test_prefilled_and_free_rows_in_one_batch(self):
        net = tiny.model()
        prompts = [stream(CAT, SURE, GEN_START), stream(DOG, DOG)]
        texts = [[DONE, GEN_START, CAT], [SURE, SURE, GEN_START, DONE]]
        together = answers(generate(net, left_padded(prompts), *texts).sequences, 3)
        for row in range(2):
            alone = generate(net, left_padded([prompts[row]]), texts[row])
            assert answers(alone.sequences, prompts[row].shape[1]) == [together[row]]
        assert [len(drawn(answer)) for answer in together] == [2 * T, T]

    @both_attentions
    def test_a_cache_from_the_turn_before_changes_nothing(self, scale_attention):
        net = tiny.model(scale_attention=scale_attention)
        first = generate(net, left_padded([PROMPTS[0]]), [SURE, GEN_START, DONE], **images_of(0))
        turn = left_padded([torch.cat([first.sequences, stream(DOG, CAT, 5)], dim=1)])
        fresh = generate(net, turn, [GEN_START, CAT, DONE], **images_of(0))
        reused = generate(net, turn, [GEN_START, CAT, DONE], **{CACHE: getattr(first, CACHE)})
        assert torch.equal(fresh.sequences, reused.sequences)


class TestWork:
    """What is computed, counted by hooks."""

    def run(self, prompts, *texts, **options):
        net = tiny.model()
        calls = Calls(net)
        counted = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output: setattr(calls, "decoder", calls.decoder + isinstance(module, Decoder))
        )
        with counted:
            out = generate(net, left_padded(prompts), *texts, **options)
        return out, calls

    def test_one_picture(self):
        _, calls = self.run([PROMPTS[0]], [SURE, GEN_START, DONE, CAT], **images_of(0))
        # prompt; SURE; <gen_start>; the scales after the first, <gen_end> with the last; DONE; CAT. EOS is not read.
        assert calls.lengths == [5, 1, 1, 4, 9, 16 + 1, 1, 1]
        assert calls.head == [1, 1, 1, 1, 1, 1]  # all but the three scales, one position each
        assert calls.vision == 1 and calls.decoder == 0

    def test_a_prefilled_start_costs_one_prefill_and_the_scales(self):
        _, calls = self.run([stream(CAT, DOG, GEN_START)], [DONE], max_new_tokens=1)
        assert calls.lengths == [3, 4, 9, 16 + 1]

    def test_pending_pictures_are_drawn_together(self):
        _, calls = self.run(PROMPTS, *TEXTS, **images_of(0, 3))
        sweep = [*SIZES[1:-1], SIZES[-1] + 1]
        # five steps until the last row has its <gen_start>, one sweep for three rows, text, a sweep for one row
        assert calls.lengths == [PROMPTS[3].shape[1], *[1] * 5, *sweep, 1, 1, 1, *sweep, 1]

    def test_no_picture_costs_what_text_costs(self):
        _, calls = self.run([PROMPTS[2]], TEXTS[2])
        assert calls.lengths == [3, 1, 1, 1, 1]

    def test_image_features_can_be_reused(self):
        net = tiny.model()
        pixels = generate(net, left_padded([PROMPTS[0]]), TEXTS[0], **images_of(0))
        features = {"image": net.get_image_features(**images_of(0), return_dict=True)}
        calls = Calls(net)
        for _ in range(2):
            reused = generate(net, left_padded([PROMPTS[0]]), TEXTS[0], mm_encoder_outputs=features)
            assert torch.equal(reused.sequences, pixels.sequences)
        assert calls.vision == 0


class TestLimits:
    @pytest.mark.parametrize(
        "limit, expected",
        [
            (1, [SURE]),
            (2, [SURE, GEN_START, T]),
            (3, [SURE, GEN_START, T, DONE]),
            (5, [SURE, GEN_START, T, DONE, CAT, GEN_START, T]),
            (9, [SURE, GEN_START, T, DONE, CAT, GEN_START, T, EOS]),
        ],
    )
    @pytest.mark.parametrize("as_length", [False, True])
    def test_max_new_tokens_counts_text(self, limit, expected, as_length):
        options = {"max_length": 2 + limit, "max_new_tokens": None} if as_length else {"max_new_tokens": limit}
        out = generate(tiny.model(), left_padded([PROMPTS[1]]), [SURE, GEN_START, DONE, CAT, GEN_START], **options)
        (answer,) = answers(out.sequences, 2)
        folded, at = [], 0
        while at < len(answer):
            length = len(drawn(answer[at : at + T])) if drawn(answer[at : at + 1]) else 0
            folded.append(length or answer[at])
            at += length or 1
        assert folded == expected

    def test_limits_are_per_row(self):
        out = generate(
            tiny.model(), left_padded(PROMPTS[1:3]), [GEN_START, DONE, CAT], [CAT, CAT, CAT], max_new_tokens=2
        )
        picture, text = answers(out.sequences, 3)
        assert picture[0] == GEN_START and picture[-1] == DONE and len(picture) == T + 2
        assert text == [CAT, CAT]

    @pytest.mark.parametrize("pad, eos", [(PAD, EOS), (EOS, EOS), (None, EOS), (EOS, [EOS, 9])])
    def test_padding_and_end(self, pad, eos):
        net = tiny.model()
        net.generation_config.update(pad_token_id=pad, eos_token_id=eos)
        pad = EOS if pad is None else pad
        texts = [[SURE, GEN_START, DONE], [CAT, EOS], [GEN_START, DOG, DOG, DOG]]
        out = generate(net, left_padded(PROMPTS[:3]), *texts, **images_of(0), pad_token_id=pad)
        assert out.sequences.shape[1] == 5 + T + 5
        rows = [row[5:].tolist() for row in out.sequences]
        for row, text in enumerate(texts):
            plain = [t for t in rows[row] if not drawn([t])]
            whole = [t for t in text if t != EOS] + [EOS]
            assert plain == whole + [pad] * (len(plain) - len(whole))
        assert [len(drawn(row)) for row in rows] == [T, 0, T]

    def test_without_end_and_padding_ids(self):
        net = tiny.model()
        net.generation_config.update(pad_token_id=None, eos_token_id=None)
        script = [tiny.Script(3, [GEN_START, DONE], [DOG, GEN_START], pad=GEN_END)]
        options = {"max_new_tokens": 2, "do_sample": False, "logits_processor": script}
        first, second = (row[3:].tolist() for row in net.generate(**left_padded(PROMPTS[1:3]), **options))
        assert len(drawn(first)) == len(drawn(second)) == T
        assert first[0] == GEN_START and first[-1] == DONE and second[:2] == [DOG, GEN_START]

    def test_own_stopping_criteria(self):
        class StopAfter(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return input_ids[:, -1] == DONE

        stopping = StoppingCriteriaList([StopAfter()])
        out = generate(tiny.model(), left_padded([PROMPTS[1]]), [GEN_START, DONE, CAT], stopping_criteria=stopping)
        (answer,) = answers(out.sequences, 2)
        assert answer[-1] == DONE and len(answer) == T + 2
