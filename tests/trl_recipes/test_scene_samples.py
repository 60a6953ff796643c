"""Composed scenes as token streams: labels, pictures and batches."""

import numpy as np
import torch
from PIL import Image

from trl_recipes.scene_samples import SceneCollator


def visual(processor, ids: torch.Tensor) -> torch.Tensor:
    """The codes among the ids of a stream."""
    return ids[ids >= processor.visual_token_offset] - processor.visual_token_offset


def test_labels_are_the_answer_and_nothing_else(parts, samples, known_scenes):
    tokenizer, sample = parts[1].tokenizer, samples[0]
    for expression, ids, labels in zip(
        known_scenes[0]["expressions"], sample["input_ids"], sample["labels"], strict=True
    ):
        start = int((labels != -100).nonzero()[0])
        end = start + int((labels != -100).sum())
        assert torch.equal(labels[start:end], ids[start:end])
        assert tokenizer.decode(ids[:start]).endswith(
            f"segment {expression['text']} in this image.<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.decode(ids[end:]) == "\n"
        answer = tokenizer.decode([token for token in ids[start:end] if "<visual" not in tokenizer.decode(token)])
        drawn = "Sure, the segmentation result: <gen_start>.<|im_end|>"
        assert answer == ("There is no egg.<|im_end|>" if expression["kind"] == "none" else drawn)


def test_a_sample_holds_a_picture_for_each_mask_and_none_for_what_is_missing(parts, samples, known_scenes):
    processor = parts[1]
    counts = [len(visual(processor, ids)) for ids in samples[0]["input_ids"]]
    assert [expression["kind"] for expression in known_scenes[0]["expressions"]].index("none") == 2
    assert counts == [85, 85, 0, 85] and processor.num_visual_tokens == 85


def test_the_picture_in_the_stream_is_the_mask(parts, samples, known_scenes):
    processor = parts[1]
    for expression, ids in zip(known_scenes[0]["expressions"], samples[0]["input_ids"], strict=True):
        if expression["kind"] == "none":
            continue
        codes = visual(processor, ids)[None]
        (grey,), _ = processor.decode_masks(codes)
        squashed = np.asarray(Image.fromarray(np.uint8(expression["mask"]) * 255).resize((8, 8), Image.BICUBIC)) / 255
        assert np.abs(grey - squashed).max() < 0.07  # codes are 0.125 apart in [0, 1]
        _, (mask,) = processor.decode_masks(codes, [expression["mask"].shape])
        assert (mask & expression["mask"]).sum() / (mask | expression["mask"]).sum() > 0.75


def test_fewer_scales_are_the_beginning_of_the_same_picture(parts, samples, known_scenes):
    processor = parts[1]
    whole = visual(processor, samples[0]["input_ids"][0])
    processor.num_scales = 3
    try:
        coarse = visual(processor, samples[0]["input_ids"][0])
    finally:
        processor.num_scales = None
    assert torch.equal(coarse, whole[:21])


def test_the_collator_pads_on_the_right_and_says_whose_image(samples):
    pad = 9999
    batch = SceneCollator(pad)([samples[0], samples[1]])
    rows = [*samples[0]["input_ids"], *samples[1]["input_ids"]]
    labels = [*samples[0]["labels"], *samples[1]["labels"]]
    longest = max(len(row) for row in rows)
    width = batch["input_ids"].shape[1]
    assert batch["pixel_values"].shape == (2, 3, 256, 256)
    assert torch.equal(batch["pixel_values"][1], samples[1]["pixel_values"])
    assert batch["image_index"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert width % 16 == 0 and longest <= width < longest + 16
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        size = len(row)
        assert torch.equal(batch["input_ids"][i, :size], row) and (batch["input_ids"][i, size:] == pad).all()
        assert torch.equal(batch["labels"][i, :size], label) and (batch["labels"][i, size:] == -100).all()
        assert batch["attention_mask"][i].tolist() == [1] * size + [0] * (width - size)
