"""Generated streams back to text and masks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

T = 21


@pytest.fixture
def streams(processor):
    """Builds (B, L) sequences out of rows of strings and pictures (a picture: an int, its one grey step everywhere)."""

    def build(*rows):
        ids = []
        for row in rows:
            ids.append([])
            for part in row:
                if isinstance(part, int):
                    ids[-1] += [processor.gen_start_token_id] + [processor.visual_token_offset + part] * T
                else:
                    ids[-1] += processor.tokenizer(part, add_special_tokens=False)["input_ids"]
        length = max(map(len, ids))
        return torch.tensor([row + [processor.tokenizer.pad_token_id] * (length - len(row)) for row in ids])

    return build


def test_answers(processor, streams):
    sequences = streams(["Sure: ", 7, ".<|im_end|>"], ["Nothing there.<|im_end|>"], [0, " and ", 7, "<|im_end|>"])
    answers = processor.post_process_segmentation(
        sequences, target_sizes=[(4, 6), (5, 5), (3, 2)], labels=["dog", "cat", ["hole"]]
    )
    assert [answer["text"] for answer in answers] == ["Sure: .", "Nothing there.", "and"]
    assert [[s["label"] for s in answer["segments"]] for answer in answers] == [["dog"], [], ["hole", None]]
    (dog,), _, (hole, other) = (answer["segments"] for answer in answers)
    assert dog["mask"].shape == (4, 6) and dog["mask"].dtype == np.bool_ and dog["mask"].all()
    assert hole["mask"].shape == (3, 2) and not hole["mask"].any() and other["mask"].all()
    assert dog["score"] is None
    assert processor.visual_tokenizer.decode_calls == 1


def test_without_sizes_masks_have_the_size_of_the_picture(processor, streams):
    assert processor.post_process_segmentation(streams([7]))[0]["segments"][0]["mask"].shape == (16, 16)


def test_threshold(processor, streams):
    assert processor.post_process_segmentation(streams([4]))[0]["segments"][0]["mask"].all()
    assert not processor.post_process_segmentation(streams([4]), threshold=0.7)[0]["segments"][0]["mask"].any()


def test_options_out_of_range(processor, streams):
    for threshold in (-0.1, 1, 127):
        with pytest.raises(ValueError, match="from 0 to below 1"):
            processor.post_process_segmentation(streams([4]), threshold=threshold)
    for scale in (-1, 0, 9):
        with pytest.raises(ValueError, match="stop_at_scale must be from 1 to"):
            processor.post_process_segmentation(streams([4]), stop_at_scale=scale)


def test_prompt_does_not_answer(processor, streams):
    prompt = ["like ", 0, "?<gen_start>"]
    whole = streams([*prompt[:2], "?", 7, "."])
    length = streams(prompt).shape[1]
    (answer,) = processor.post_process_segmentation(whole, prompt_length=length - 1)
    assert answer["text"] == "." and [s["mask"].all() for s in answer["segments"]] == [True]
    (prefilled,) = processor.post_process_segmentation(whole, prompt_length=length)
    assert prefilled["text"] == "." and [s["mask"].all() for s in prefilled["segments"]] == [True]
    (after,) = processor.post_process_segmentation(whole, prompt_length=length + 1)
    assert after["segments"] == []
    (everything,) = processor.post_process_segmentation(whole)
    assert everything["text"] == "like ?." and [s["mask"].all() for s in everything["segments"]] == [False, True]


def test_padding_is_looked_through(processor, streams):
    row = streams(["a", 7, "b"])[0].tolist()
    pad = processor.tokenizer.pad_token_id
    waiting = torch.tensor([[pad, pad, *row[:2], pad, pad, *row[2:], pad]])
    (answer,) = processor.post_process_segmentation(waiting)
    assert answer["text"] == "ab" and answer["segments"][0]["mask"].all()


def test_scores_belong_to_drawn_pictures(processor, streams):
    outputs = SimpleNamespace(sequences=streams([0, "?", 7, 7], ["no"]), picture_scores=[[0.25, torch.tensor(0.5)], []])
    answers = processor.post_process_segmentation(outputs)
    assert [s["score"] for s in answers[0]["segments"]] == [None, 0.25, 0.5]
    answers = processor.post_process_segmentation(outputs, prompt_length=1 + T + 1)
    assert [s["score"] for s in answers[0]["segments"]] == [0.25, 0.5]
    outputs.picture_scores = [[0.25] * 4, []]
    with pytest.raises(ValueError, match="picture_scores do not fit"):
        processor.post_process_segmentation(outputs)


@pytest.mark.parametrize("drawn", [0, 1, T - 1])
def test_cut_stream(processor, streams, drawn):
    cut = streams(["a", 7])[:, : 2 + drawn]
    with pytest.raises(ValueError, match=f"answer 0.*cut after {drawn} of 21 tokens.*max_length"):
        processor.post_process_segmentation(cut)
    padded = torch.cat([cut, torch.full((1, 3), processor.tokenizer.pad_token_id)], dim=1)
    with pytest.raises(ValueError, match=f"cut after {drawn} of 21"):
        processor.post_process_segmentation(padded)


def test_malformed_streams(processor, streams):
    whole = streams(["a", 7, "b"])
    with pytest.raises(ValueError, match="21 visual tokens stand outside"):
        processor.post_process_segmentation(whole[:, 2:])
    with pytest.raises(ValueError, match="followed by 20 visual tokens where a picture has 21"):
        processor.post_process_segmentation(torch.cat([whole[:, :5], whole[:, 6:]], dim=1))
    with pytest.raises(ValueError, match="1 visual tokens stand outside"):
        processor.post_process_segmentation(torch.cat([whole[:, :5], whole[:, 4:]], dim=1))
    with pytest.raises(ValueError, match=r"\(B, L\)"):
        processor.post_process_segmentation(whole[0])
    with pytest.raises(ValueError, match="target_sizes needs a list of 1"):
        processor.post_process_segmentation(whole, target_sizes=[(1, 1)] * 2)
    for labels in ("dog", ["dog", "cat"]):
        with pytest.raises(ValueError, match="labels needs one entry"):
            processor.post_process_segmentation(whole, labels=labels)


def test_text_needs_no_visual_tokenizer(toys, streams):
    text_only = toys.processor(vq_model=None)
    assert text_only.post_process_segmentation(streams(["a"])) == [{"text": "a", "segments": []}]
    with pytest.raises(ValueError, match="without a visual tokenizer"):
        text_only.post_process_segmentation(streams(["a", 7]))


def test_what_goes_in_comes_out(processor, image, mask):
    conversation = processor.build_segmentation_conversation(image, "dog", mask)
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
    prompt = processor.apply_chat_template(conversation[:1], tokenize=True, add_generation_prompt=True)
    (answer,) = processor.post_process_segmentation(
        inputs["input_ids"], [image.size[::-1]], prompt_length=prompt.shape[1]
    )
    assert answer["text"] == "Sure, the segmentation result: ."
    assert np.array_equal(answer["segments"][0]["mask"], mask)


def test_read_pictures(processor, streams):
    rows = processor.read_pictures(streams(["Sure: ", 7, "."], ["Nothing."], [0, " and ", 7]))
    assert [[one.unique().tolist() for one in row] for row in rows] == [[[7]], [], [[0], [7]]]
    assert all(one.shape == (T,) and one.dtype == torch.long for row in rows for one in row)
    with pytest.raises(ValueError, match="answer 0: "):
        processor.read_pictures(streams([7])[:, :-1])
