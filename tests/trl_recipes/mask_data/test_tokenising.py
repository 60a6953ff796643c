"""Rows become the token ids that the processor itself would make, once; batches are what `forward` takes."""

import copy
import inspect

import own_masks
import pytest
import torch

from processing import ARGenSegProcessor
from processing.mask_inputs import load_mask
from trl_recipes.mask_data import BadSample, MaskCollator, conversation_of, load_mask_data, tokenise_masks
from trl_recipes.mask_data.tokenising import fingerprint_of, target_masks


@pytest.fixture(scope="module")
def processor(toy_folder):
    return ARGenSegProcessor.from_pretrained(toy_folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_mask_data(own_masks.as_jsonl(tmp_path_factory.mktemp("own") / "own"), progress=False)


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    return load_mask_data(own_masks.as_conversations(tmp_path_factory.mktemp("own") / "own"), progress=False)


def answers(processor, row) -> list[int]:
    return [id_ for id_ in row["labels"] if id_ != -100]


def codes_of(processor, ids: list[int]) -> torch.Tensor:
    codes = torch.tensor(ids) - processor.visual_token_offset
    codes = codes[(codes >= 0) & (codes < processor.visual_vocab_size)]
    return codes.view(-1, processor.num_visual_tokens)


def test_ids_are_those_of_the_processor_itself(processor, rows, tmp_path):
    found = tokenise_masks(rows, processor, tmp_path)
    assert len(found) == len(rows) and found["sample"] == rows["sample"]
    for row in found:
        mask = own_masks.masks()["square" if "square" in row["prompt"] else "disc"]
        chat = processor.build_segmentation_conversation(row["image"], row["prompt"], mask if row["masks"] else None)
        expected = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0].tolist()
        assert row["input_ids"][: len(expected)] == expected
        assert len(row["labels"]) == len(row["input_ids"])
        learned = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert [row["input_ids"][i] for i in learned] == answers(processor, row)
        assert learned == list(range(learned[0], learned[-1] + 1))
        start = processor.tokenizer.decode(row["input_ids"][: learned[0]])
        assert start.endswith("assistant\n")


def test_the_answer_is_the_mask_or_words(processor, rows, tmp_path):
    found = tokenise_masks(rows, processor, tmp_path)
    square, _, whale = (answers(processor, found[i]) for i in range(3))
    assert torch.equal(codes_of(processor, square), processor.encode_masks(own_masks.masks()["square"]))
    assert processor.gen_start_token_id in square
    assert len(codes_of(processor, whale)) == 0 and processor.gen_start_token_id not in whale
    assert "There is no whale." in processor.tokenizer.decode(whale)


def test_conversations_keep_their_words_and_all_their_masks(processor, dialogues, tmp_path):
    found = tokenise_masks(dialogues, processor, tmp_path)
    square, disc = processor.encode_masks(list(own_masks.masks().values()))
    both, history, words, _ = found
    assert torch.equal(codes_of(processor, answers(processor, both)), torch.stack([square, disc]))
    assert torch.equal(codes_of(processor, answers(processor, history)), torch.stack([square, disc]))
    for text in ("The square?", "Here: ", "And the ball?", "Sure, "):
        assert text in processor.tokenizer.decode(history["input_ids"])
    assert "No." in processor.tokenizer.decode(answers(processor, words))
    assert [len(target_masks(row)) for row in dialogues] == [2, 1, 0, 1]
    assert (load_mask(target_masks(history)[0]) == own_masks.masks()["disc"]).all()


def test_requests_are_conversations_without_the_last_answer(processor, dialogues):
    request = conversation_of(processor, dialogues[1])[:-1]
    assert [turn["role"] for turn in request] == ["user", "assistant", "user"]
    assert [block["type"] for block in request[0]["content"]] == ["image", "text"]
    assert [block["type"] for block in request[1]["content"]] == ["text", "mask", "text"]


def count_encodings(processor, monkeypatch) -> list[int]:
    """Fills with the number of masks of each call of the visual tokenizer's encoder."""
    seen, encode = [], processor.visual_tokenizer.encode
    monkeypatch.setattr(processor.visual_tokenizer, "encode", lambda x: seen.append(len(x)) or encode(x))
    return seen


def test_masks_are_tokenised_once(processor, rows, tmp_path, monkeypatch):
    seen = count_encodings(processor, monkeypatch)
    first = tokenise_masks(rows, processor, tmp_path)
    assert sum(seen) == 4
    again = tokenise_masks(rows.select(range(6)), processor, tmp_path)
    assert sum(seen) == 4 and again["input_ids"] == first["input_ids"]
    tokenise_masks(rows.select([0]), processor, tmp_path)
    assert sum(seen) == 5


def test_anything_that_ids_depend_on_changes_the_fingerprint(processor, rows, dialogues, monkeypatch):
    def changed(**attributes):
        other = copy.copy(processor)
        for name, value in attributes.items():
            setattr(other, name, value)
        return fingerprint_of(rows, other)

    visual_tokenizer = copy.deepcopy(processor.visual_tokenizer)
    with torch.no_grad():
        visual_tokenizer.quantize.embedding.weight[0, 0] += 1e-6
    prints = [
        fingerprint_of(rows, processor),
        fingerprint_of(dialogues, processor),
        fingerprint_of(rows.select([1, 0, 2, 3, 4, 5]), processor),
        changed(_vq_model=visual_tokenizer),
        changed(mask_resize_sizes=[32, 16]),
        changed(num_scales=2),
        changed(image_seq_length=4),
        changed(segmentation_prompt="Where is {prompt}?"),
        changed(segmentation_answer="{mask}"),
        changed(chat_template=processor.chat_template + " "),
    ]
    assert len(set(prints)) == len(prints)
    assert changed() == prints[0]
    monkeypatch.setattr(inspect, "getsource", lambda module: f"another way than that of {module.__name__}")
    assert changed() not in prints


@pytest.mark.parametrize(
    ("prompt", "message"), [("the <mask>", "holds 2 <mask>"), ("a " * 200, "more than the context")]
)
def test_a_row_that_cannot_be_tokenised_is_named(processor, tmp_path, capsys, prompt, message):
    own = own_masks.rows()
    own[3]["prompt"] = prompt
    path = own_masks.write_jsonl(own_masks.write_pictures(tmp_path / "own") / "own.jsonl", own)
    rows = load_mask_data(path, progress=False)
    with pytest.raises(BadSample, match=rf"own\.jsonl line 4: .*{message}"):
        tokenise_masks(rows, processor, tmp_path)
    found = tokenise_masks(rows, processor, tmp_path, skip_bad_samples=True)
    assert found["sample"] == [row["sample"] for i, row in enumerate(rows) if i != 3]
    assert "skipped 1 bad samples, 5 are used" in capsys.readouterr().out


def test_batches_are_what_the_model_learns_from(processor, rows, toy_folder, tmp_path):
    from modeling_argenseg import ARGenSegForConditionalGeneration

    model = ARGenSegForConditionalGeneration.from_pretrained(toy_folder)
    found = tokenise_masks(rows, processor, tmp_path)
    batch = MaskCollator(processor)([found[1], found[2]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[1] % 16 == 0 and batch["pixel_values"].shape == (2, 3, 28, 28)
    length = len(found[1]["input_ids"])
    assert batch["input_ids"][0, :length].tolist() == found[1]["input_ids"]
    assert batch["attention_mask"].sum(1).tolist() == [length, len(found[2]["input_ids"])]
    chat = processor.build_segmentation_conversation(found[1]["image"], found[1]["prompt"], own_masks.masks()["disc"])
    single = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    spoken = torch.as_tensor(single.pop("assistant_masks")).bool()
    labels = single["input_ids"].masked_fill(~spoken, -100)
    torch.testing.assert_close(batch["pixel_values"][:1], single["pixel_values"])
    expected = model(**single, labels=labels).loss
    torch.testing.assert_close(model(**MaskCollator(processor)([found[1]])).loss, expected)
