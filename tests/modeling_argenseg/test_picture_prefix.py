"""Pictures whose first scales are given (`picture_prefix`): what follows them is what teacher forcing says."""

from typing import Any

import pytest
import tiny
import torch
from tiny import (
    CODES,
    DONE,
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
