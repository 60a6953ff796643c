"""The Qwen-VL family: its own classes' numbers on images of one size, and every way of generating the same picture."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import (
    CAT,
    DOG,
    DONE,
    EOS,
    GEN_START,
    GRID,
    IMAGE,
    PAD,
    SURE,
    VOCAB,
    T,
    answers,
    generate,
    left_padded,
    starts_of,
    stream,
    visual_logits,
)  # fmt: skip
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
)

from modeling_argenseg import ARGenSegForConditionalGeneration
from modeling_argenseg.image_grid import patchify

KINDS = [Qwen2VLConfig, Qwen2_5_VLConfig, Qwen3VLConfig]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.model_type)
both_scales = pytest.mark.parametrize("scale_attention", ["causal", "block"])
PLACES = [IMAGE] * (GRID[0] * GRID[1])
# two images, one, and none
PROMPTS = [stream(5, *PLACES, 7, *PLACES, CAT, 9), stream(6, *PLACES, DOG), stream(9, CAT, 6)]
TEXTS = [[SURE, GEN_START, DONE], [GEN_START, DONE, SURE, GEN_START, CAT], [SURE, DOG, CAT, DONE]]


def images(*rows: int) -> torch.Tensor:
    """Those of the given prompts (N, 3, 16, 24)."""
    every = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    return torch.cat([every[[[0, 1], [2], []][row]] for row in rows])


def make(kind: type, attention: str = "sdpa", **changes: Any) -> ARGenSegForConditionalGeneration:
    return tiny.model(tiny.qwen_vl_config(kind), attention=attention, image_grid=GRID, **changes)


def plain_and_ours(kind: type) -> tuple[Any, ARGenSegForConditionalGeneration]:
    torch.manual_seed(0)
    vlm = AutoModelForImageTextToText.from_config(tiny.qwen_vl_config(kind)).eval()
    return vlm, ARGenSegForConditionalGeneration.from_vlm(vlm, tiny.visual_tokenizer(), image_grid=GRID).eval()


def own_inputs(vlm: Any, inputs: dict[str, torch.Tensor], pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """As the library's classes take them."""
    patches, grid = patchify(pixel_values, vlm.config.vision_config, GRID)
    types = (inputs["input_ids"] == IMAGE).int()
    return {**inputs, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}


def test_patches_are_those_of_the_library() -> None:
    vision = tiny.qwen_vl_config(Qwen2_5_VLConfig).vision_config
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False, do_rescale=False, do_normalize=False
    )
    pixels = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    expected = processor(list(pixels), return_tensors="pt", input_data_format="channels_last")
    patches, grid = patchify(torch.tensor(pixels).permute(0, 3, 1, 2), vision, GRID)
    assert torch.equal(patches, expected["pixel_values"].float())
    assert torch.equal(grid, expected["image_grid_thw"])


@every_kind
def test_logits_are_those_of_the_library(kind: type) -> None:
    """Of a ragged batch with two images in a row, and of rows by themselves without a mask."""
    vlm, net = plain_and_ours(kind)
    inputs = left_padded(PROMPTS[:2])
    expected = vlm(**own_inputs(vlm, inputs, images(0, 1))).logits
    found = net(**inputs, pixel_values=images(0, 1)).logits[..., :VOCAB]
    used = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[used], expected[used], atol=1e-5, rtol=1e-5)
    for row, prompt in enumerate(PROMPTS[:2]):
        alone = net(prompt, pixel_values=images(row)).logits[0, :, :VOCAB]
        torch.testing.assert_close(alone, expected[row, used[row]], atol=1e-5, rtol=1e-5)
    plain = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    other = net(**inputs, pixel_values=images(0, 1), position_ids=plain).logits[..., :VOCAB]
    assert (other - expected)[used].abs().max() > 1  # positions matter here


@every_kind
def test_positions_are_those_of_the_library(kind: type) -> None:
    vlm, net = plain_and_ours(kind)
    inputs = left_padded(PROMPTS)
    own = own_inputs(vlm, inputs, images(0, 1))
    del own["pixel_values"]
    expected, deltas = vlm.model.get_rope_index(**own)
    positions = net.model.text_positions(**inputs)
    is_text, used = inputs["input_ids"] != IMAGE, inputs["attention_mask"].bool()
    for axis in expected:
        assert torch.equal(positions[is_text & used], axis[is_text & used])
    assert torch.equal(positions[:, -1] + 1, (used.sum(-1) + deltas[:, 0]))
    longer = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    assert torch.equal(net.model.text_positions(inputs["input_ids"], longer)[:, -1], positions[:, -1] + 2)


@every_kind
def test_embeddings_in_place_of_ids(kind: type) -> None:
    net = make(kind)
    inputs = left_padded(PROMPTS[:2])
    expected = net(**inputs, pixel_values=images(0, 1)).logits
    embeds = net.get_input_embeddings()(inputs["input_ids"])
    found = net(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], pixel_values=images(0, 1)).logits
    torch.testing.assert_close(found, expected)


@every_kind
@both_scales
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_drawing_equals_teacher_forcing_and_batch_equals_single(
    kind: type, scale_attention: str, attention: str
) -> None:
    net = make(kind, attention, scale_attention=scale_attention)
    inputs = left_padded(PROMPTS)
    length = inputs["input_ids"].shape[1]
    together = generate(net, inputs, *TEXTS, pixel_values=images(0, 1, 2))
    for row, prompt in enumerate(PROMPTS):
        more = {"pixel_values": images(row)} if row < 2 else {}
        alone = generate(net, left_padded([prompt]), TEXTS[row], **more)
        assert answers(together.sequences, length)[row] == answers(alone.sequences, prompt.shape[1])[0]
        pictures = starts_of(alone.sequences[0], prompt.shape[1])
        assert len(pictures) == TEXTS[row].count(GEN_START)
        for number, start in enumerate(pictures):
            ids = alone.sequences[0, start + 1 : start + 1 + T] - tiny.FIRST_VISUAL
            logits = visual_logits(net, alone.sequences[0], start, **more)
            assert torch.equal(logits.argmax(-1), ids) and len(ids.unique()) > 2
            logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            torch.testing.assert_close(alone.picture_token_logprobs[0][number], logprobs, atol=1e-4, rtol=1e-4)


@every_kind
@both_scales
def test_short_cuts_give_the_same_ids(kind: type, scale_attention: str) -> None:
    net = make(kind, scale_attention=scale_attention)
    one = [PROMPTS[1], torch.cat([PROMPTS[1], stream(7, 8, CAT)], dim=1)]
    inputs, texts, both = left_padded(one, extra=2), [TEXTS[1], TEXTS[0]], torch.cat([images(1)] * 2)
    plain = generate(net, inputs, *texts, pixel_values=both).sequences
    static = generate(net, inputs, *texts, pixel_values=both, cache_implementation="static").sequences
    encoded = net.encode_image(PROMPTS[1], pixel_values=images(1))
    shared = generate(net, inputs, *texts, encoded_image=encoded).sequences
    assert torch.equal(plain, static) and torch.equal(plain, shared)
    whole = {**left_padded([PROMPTS[1]]), "pixel_values": images(1)}  # not padded: a static cache needs no mask then
    one_plain, one_static = (
        generate(net, whole, TEXTS[1], cache_implementation=kind).sequences for kind in (None, "static")
    )
    assert torch.equal(one_plain, one_static)
    words = dict(picture_answer_ids=[SURE, GEN_START, DONE, EOS], picture_prefill="always", max_new_tokens=4)
    drafted = net.generate(**inputs, pixel_values=both, do_sample=False, **words)
    begun = left_padded([torch.cat([row, stream(SURE, GEN_START)], dim=1) for row in one])
    picture = net.generate(**begun, pixel_values=both, do_sample=False, max_new_tokens=1)
    for one, other in zip(drafted, picture, strict=True):  # what follows the first picture is as it comes
        assert torch.equal(one[net.config.is_visual(one)][:T], other[net.config.is_visual(other)][:T])


@every_kind
def test_a_conversation_goes_on_from_the_cache(kind: type) -> None:
    net = make(kind)
    outputs = generate(net, left_padded(PROMPTS[:2]), *TEXTS[:2], pixel_values=images(0, 1))
    ids = torch.cat([outputs.sequences, torch.tensor([[CAT, DOG]] * 2)], dim=1)
    mask, read = (ids != PAD).long(), outputs.past_key_values.get_seq_length()
    whole = net(ids, attention_mask=mask, pixel_values=images(0, 1)).logits[:, -2:]
    positions = net.model.text_positions(ids, mask)[:, read:]
    found = net(
        ids[:, read:], attention_mask=mask, position_ids=positions, past_key_values=outputs.past_key_values
    ).logits[:, -2:]
    torch.testing.assert_close(found, whole, atol=2e-4, rtol=1e-4)


@every_kind
def test_training_on_padded_rows_is_training_on_each(kind: type) -> None:
    net = make(kind, scale_attention="block").train()
    (picture,) = tiny.pictures(1)
    rows = [torch.cat([prompt, stream(GEN_START, picture, EOS)], dim=1) for prompt in PROMPTS[:2]]
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (0, longest - row.shape[1]), value=PAD) for row in rows])
    labels = ids.masked_fill(~net.config.is_visual(ids), -100)
    together = net(ids, attention_mask=(ids != PAD).long(), labels=labels, pixel_values=images(0, 1))
    single = [
        net(row, labels=row.masked_fill(~net.config.is_visual(row), -100), pixel_values=images(number)).loss
        for number, row in enumerate(rows)
    ]
    torch.testing.assert_close(together.loss, torch.stack(single).mean())
    together.loss.backward()
    assert all(parameter.grad is not None for parameter in net.model.vlm.visual.parameters())


def test_saved_and_loaded(tmp_path: Any) -> None:
    net = make(Qwen3VLConfig)
    net.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.config.image_grid == GRID
    inputs = left_padded(PROMPTS[:2])
    found, expected = (one.eval()(**inputs, pixel_values=images(0, 1)).logits for one in (loaded, net))
    torch.testing.assert_close(found, expected)


class TestWhatCannotBe:
    def test_a_grid_is_asked_for_where_it_belongs(self) -> None:
        with pytest.raises(ValueError, match=r"Qwen2_5_VLModel needs image_grid=\[rows, columns\]"):
            tiny.model(tiny.qwen_vl_config(Qwen2_5_VLConfig))
        with pytest.raises(ValueError, match="image_grid is not for InternVLModel, but for qwen2_vl"):
            tiny.model(image_grid=GRID)
        with pytest.raises(ValueError, match=r"image_grid must be \[rows, columns\]"):
            tiny.model(tiny.qwen_vl_config(Qwen2VLConfig), image_grid=[2])

    def test_an_image_of_another_size(self) -> None:
        net = make(Qwen2VLConfig)
        with pytest.raises(ValueError, match=r"images must be 16 x 24 pixels .*\[2, 3\].*got 24 x 24"):
            net(PROMPTS[1], pixel_values=torch.zeros(1, 3, 24, 24))

    def test_where_images_were_must_be_known(self) -> None:
        net = make(Qwen2VLConfig)
        cache = net(PROMPTS[1], pixel_values=images(1), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="a stream that goes on needs position_ids"):
            net(stream(CAT), past_key_values=cache)
        with pytest.raises(ValueError, match="packed streams"):
            net(PROMPTS[2], position_ids=torch.tensor([[0, 1, 0]]))
        with pytest.raises(ValueError, match="prefill_chunk_size would cut"):
            net.generate(PROMPTS[1], pixel_values=images(1), prefill_chunk_size=2, max_new_tokens=2)
