"""Pictures whose first scales are given (`picture_prefix`): what follows them is what teacher forcing says."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import (
    CODES,
    DONE,
    EOS,
    FIRST_VISUAL,
    GEN_START,
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
from transformers import CompileConfig

WHOLE = [sum(side * side for side in SIDES[: count + 1]) for count in range(len(SIDES))]


def codes(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    return tiny.pictures(rows, seed, length) - FIRST_VISUAL


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("scale_attention", ["causal", "block"])
@pytest.mark.parametrize("given", WHOLE[:-1])
def test_the_rest_is_what_teacher_forcing_says(given: int, scale_attention: str, cache: str | None) -> None:
    net, prompt, prefix = tiny.model(scale_attention=scale_attention), PROMPTS[0], codes(1, given)
    options: dict[str, Any] = {"cache_implementation": cache, **images_of(0)}
    out = generate(net, left_padded([prompt]), [SURE, GEN_START, DONE], picture_prefix=prefix, **options)
    (start,) = starts_of(out.sequences[0])
    ids = out.sequences[0, start + 1 : start + 1 + T] - FIRST_VISUAL
    forced = visual_logits(net, out.sequences[0], start, **images_of(0))
    assert ids[:given].tolist() == prefix[0].tolist()
    assert ids[given:].tolist() == forced.argmax(-1)[given:].tolist() and DONE in out.sequences[0, start + T :]
    assert ids[:given].tolist() != forced.argmax(-1)[:given].tolist()
    logprobs = forced.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(out.picture_token_logprobs[0][0], logprobs, atol=5e-4, rtol=1e-3)


def test_first_scales_that_it_would_draw_change_nothing() -> None:
    net, prompts = tiny.model(), left_padded(PROMPTS)
    plain = generate(net, prompts, *TEXTS, **images_of(0, 3))
    written = answers(plain.sequences, prompts["input_ids"].shape[1])
    firsts = torch.tensor([drawn(row)[: WHOLE[2]] or [FIRST_VISUAL] * WHOLE[2] for row in written]) - FIRST_VISUAL
    given = generate(net, prompts, *TEXTS, **images_of(0, 3), picture_prefix=firsts)
    assert torch.equal(given.sequences, plain.sequences)


def test_each_row_has_its_own_and_second_pictures_are_drawn_freely() -> None:
    net, prompts, prefix = tiny.model(), left_padded(PROMPTS), codes(4, WHOLE[1])
    out = generate(net, prompts, *TEXTS, **images_of(0, 3), picture_prefix=prefix)
    length = prompts["input_ids"].shape[1]
    together = answers(out.sequences, length)
    pictures = [drawn(row) for row in together]
    assert [len(row) // T for row in pictures] == [1, 2, 0, 1]
    for row in (0, 1, 3):
        assert [one - FIRST_VISUAL for one in pictures[row][: WHOLE[1]]] == prefix[row].tolist()
    assert [one - FIRST_VISUAL for one in pictures[1][T : T + WHOLE[1]]] != prefix[1].tolist()
    for row in range(4):
        prompt = left_padded([PROMPTS[row]])
        alone = generate(net, prompt, TEXTS[row], **images_of(row), picture_prefix=prefix[row : row + 1])
        assert answers(alone.sequences, PROMPTS[row].shape[1]) == [together[row]]


def test_the_prompt_may_open_the_picture() -> None:
    net, prefix = tiny.model(), codes(1, WHOLE[1])
    opened = torch.cat([PROMPTS[1], stream(GEN_START)], 1)
    out = generate(net, left_padded([opened]), [DONE], picture_prefix=prefix)
    written = generate(net, left_padded([PROMPTS[1]]), [GEN_START, DONE], picture_prefix=prefix)
    assert torch.equal(out.sequences, written.sequences)
    assert (out.sequences[0, 3 : 3 + WHOLE[1]] - FIRST_VISUAL).tolist() == prefix[0].tolist()


def test_with_guidance_and_several_samples() -> None:
    net, prefix = tiny.model(), codes(2, WHOLE[1])
    options: dict[str, Any] = {"picture_guidance_scale": 2.0, "negative_input_ids": torch.tensor([[6, 5], [7, 8]])}
    texts = [[GEN_START]] * 4
    sampling = {"do_sample": True, "num_return_sequences": 2, "picture_do_sample": True}
    out = generate(net, left_padded(PROMPTS[1:3]), *texts, picture_prefix=prefix, **options, **sampling)
    pictures = torch.tensor([drawn(row) for row in answers(out.sequences, 3)]) - FIRST_VISUAL
    assert torch.equal(pictures[:, : WHOLE[1]], prefix.repeat_interleave(2, dim=0))
    assert not torch.equal(pictures[0], pictures[1])


def passes(net: Any) -> list[int]:
    """Rows of each pass of the language model from now on."""
    rows: list[int] = []
    net.model.language_model.register_forward_hook(lambda *args: rows.append(len(args[-1].last_hidden_state)))
    return rows


RECORDED = CompileConfig(backend="cudagraphs")
RECORDED._compile_all_devices = True
NEGATIVE = torch.tensor([[6, 5], [7, 8], [5, 5], [6, 6]])


@pytest.mark.parametrize("scale_attention", ["causal", "block"])
@pytest.mark.parametrize("given", WHOLE[:-1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "compile_config": RECORDED},
        {"picture_guidance_scale": 2.0, "negative_input_ids": NEGATIVE},
        {"picture_do_sample": True},
        {"picture_stop_at_scale": 2},
        {"picture_answer_ids": [GEN_START, DONE, EOS], "picture_prefill": "always"},
    ],
    ids=["plain", "static", "recorded", "guidance", "sampled", "preview", "words known"],
)
def test_given_scales_are_read_in_one_pass_and_nothing_else_changes(
    given: int, scale_attention: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, prompts, prefix = tiny.model(scale_attention=scale_attention), left_padded(PROMPTS), codes(4, given)
    count, found = passes(net), []
    for one_by_one in (False, True):
        if one_by_one:
            monkeypatch.setattr(net, "_passes", lambda rows, count: [range(s, s + 1) for s in range(1, count)])
        for _ in range(2):  # recorded, and played
            count.clear()
            torch.manual_seed(0)
            out = generate(net, prompts, *TEXTS, **images_of(0, 3), picture_prefix=prefix, **options)
        found.append((out, len(count)))
    (together, fewer), (alone, more) = found
    assert torch.equal(together.sequences, alone.sequences)
    torch.testing.assert_close(together.picture_token_logprobs, alone.picture_token_logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.picture_scores, alone.picture_scores, rtol=1e-5, atol=1e-6)
    assert (net._scale_graphs is not None) == ("compile_config" in options)
    spared = WHOLE.index(given)  # passes, of the first pictures; one row draws a second
    assert more - fewer == min(spared, options.get("picture_stop_at_scale", 4) - 2)


def test_every_scale_is_shown_whether_given_or_drawn() -> None:
    net, prefix = tiny.model(), codes(1, WHOLE[2])
    words: dict[str, Any] = {"picture_answer_ids": [GEN_START, DONE, EOS], "picture_prefill": "always"}
    shown = list(net.stream(**left_padded([PROMPTS[1]]), **words, picture_prefix=prefix, max_new_tokens=5))
    assert [one.scale for one in shown] == [1, 2, 3, 4]
    assert [one.codes.shape[1] for one in shown] == WHOLE and shown[2].codes[0].tolist() == prefix[0].tolist()


def test_flash_attention_reads_blocks_one_by_one() -> None:
    """It has one mask for a pass."""
    for scale_attention, expected in (("causal", [[1, 2], [3]]), ("block", [[1], [2], [3]])):
        net = tiny.model(scale_attention=scale_attention)
        net.model.language_model.config._attn_implementation = "flash_attention_2"
        rows: Any = SimpleNamespace(prefix=codes(1, WHOLE[1]), logprobs=[[]], waiting=torch.tensor([True]))
        assert [list(scales) for scales in net._passes(rows, 4)] == expected


@pytest.mark.parametrize(
    "prefix, message",
    [
        (codes(1, 2), r"t one of \[1, 5, 14\]"),
        (codes(1, T), "first whole scales"),
        (codes(2, 1), r"must be \(1, t\)"),
        (codes(1, 1)[0], "got the shape"),
        (codes(1, 5) + FIRST_VISUAL, "subtract visual_token_offset = 42"),
        (codes(1, 5) - CODES, "codebook indices, 0 to 31"),
        (torch.full((1, 5), CODES), "codebook indices, 0 to 31"),
        (codes(1, 5).float(), "codebook indices"),
    ],
)
def test_mistakes(prefix: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny.model(), left_padded([PROMPTS[1]]), [GEN_START], picture_prefix=prefix)
