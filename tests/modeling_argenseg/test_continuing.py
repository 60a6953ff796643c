"""The cache that `generate` returns belongs to the sequences that it returns: a conversation can go on from it."""

from typing import Any

import pytest
import torch
from tiny import CAT, DOG, DONE, EOS, GEN_START, PAD, PROMPTS, SURE, TEXTS, generate, images_of, left_padded, model
from toy import ABSENT, BOTH, REQUESTS, photograph

from modeling_argenseg import ARGenSegForConditionalGeneration
from modeling_argenseg.cache_name import CACHE
from processing import ARGenSegProcessor

WHALE = next(iter(ABSENT))


def assert_goes_on(net: Any, outputs: Any, pad: int, more: list[int], **images: Any) -> None:
    """Words after the answer get the same logits with the cache as without."""
    after = torch.tensor([more]).expand(outputs.sequences.shape[0], -1)
    ids = torch.cat([outputs.sequences, after], dim=1)
    mask = (ids != pad).long()
    cache = getattr(outputs, CACHE)
    read = cache.get_seq_length()
    assert outputs.sequences.shape[1] - 3 < read <= outputs.sequences.shape[1]
    with torch.no_grad():
        whole = net(ids, attention_mask=mask, **images).logits[:, -len(more) :]
        found = net(ids[:, read:], attention_mask=mask, past_key_values=cache).logits[:, -len(more) :]
    torch.testing.assert_close(found, whole, atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def toy(toy_folder: Any) -> tuple[Any, Any]:
    return (
        ARGenSegForConditionalGeneration.from_pretrained(toy_folder).eval(),
        ARGenSegProcessor.from_pretrained(toy_folder),
    )


@pytest.mark.parametrize("prompts", [[WHALE], [REQUESTS[0]], [BOTH], [*ABSENT], [REQUESTS[0], WHALE, BOTH]])
@pytest.mark.parametrize("shared", [False, True])
def test_after_words_that_were_drafted(toy: Any, prompts: list[str], shared: bool) -> None:
    net, processor = toy
    chats = [processor.build_segmentation_conversation(photograph(), prompt) for prompt in prompts]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    pad = int(inputs["attention_mask"][0].sum()) - inputs["input_ids"].shape[1]
    images = {"encoded_image": net.encode_image(**one)} if shared and pad == 0 else {}
    outputs = net.generate(
        **inputs, **images, return_dict_in_generate=True, picture_answer_ids=processor.picture_answer_ids
    )
    word = processor.tokenizer("sheep", add_special_tokens=False)["input_ids"][0]
    assert_goes_on(net, outputs, processor.tokenizer.pad_token_id, [word, word], pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("scale_attention", ["causal", "block"])
def test_after_rows_that_waited(scale_attention: str) -> None:
    net = model(scale_attention=scale_attention)
    outputs = generate(net, left_padded(PROMPTS), *TEXTS, **images_of(0, 1, 2, 3))
    assert_goes_on(net, outputs, PAD, [CAT, DOG], **images_of(0, 1, 2, 3))


def test_after_guidance() -> None:
    net = model()
    prompts = left_padded([PROMPTS[1], PROMPTS[2]])
    negative = left_padded([torch.tensor([[DOG, 5, CAT, SURE]])] * 2)
    outputs = generate(
        net, prompts, [SURE, GEN_START, DONE], [GEN_START, DONE, EOS], picture_guidance_scale=1.5,
        negative_input_ids=negative["input_ids"], negative_attention_mask=negative["attention_mask"],
    )  # fmt: skip
    assert_goes_on(net, outputs, PAD, [CAT, DOG])


def test_a_static_cache_with_gaps_is_not_returned() -> None:
    net = model()
    outputs = generate(net, left_padded(PROMPTS), *TEXTS, cache_implementation="static", **images_of(0, 1, 2, 3))
    assert getattr(outputs, CACHE) is None
