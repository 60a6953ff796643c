"""Text, images, masks and conversations to model inputs."""

import numpy as np
import pytest
import torch
from PIL import Image

T = 21


def chat(processor, conversation, **kwargs):
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **kwargs)


def picture(processor, codes):
    """The ids of a picture in the stream."""
    return [processor.gen_start_token_id, *(code + processor.visual_token_offset for code in codes)]


def text_ids(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------------- text, images and masks to inputs


def test_markers_become_tokens(processor, image, mask):
    inputs = processor(image, "a<img><IMG_CONTEXT></img>b<mask>c", mask)
    codes = processor.encode_masks(mask)[0].tolist()
    expected = (
        text_ids(processor, "a<img>")
        + [processor.image_token_id] * 4
        + text_ids(processor, "</img>b")
        + picture(processor, codes)
        + text_ids(processor, "c")
    )
    assert inputs["input_ids"].tolist() == [expected]
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["pixel_values"].shape == (1, 3, 8, 8)
    assert inputs["pixel_values"].dtype == torch.float32


def test_batch_equals_single_and_pads_left(processor, image, mask):
    rows = ["<IMG_CONTEXT>: <mask>", "no picture", "<mask><mask>"]
    masks = [[mask], [], [~mask, mask]]
    batch = processor([[image], [], []], rows, masks)
    assert batch["attention_mask"][1].tolist() == sorted(batch["attention_mask"][1].tolist())
    for row, images, row_masks, ids, seen in zip(
        rows, [image, None, None], masks, batch["input_ids"], batch["attention_mask"], strict=True
    ):
        assert ids[seen == 1].tolist() == processor(images, row, row_masks)["input_ids"][0].tolist()
    flat = processor(image, rows, [mask, ~mask, mask])
    assert torch.equal(flat["input_ids"], batch["input_ids"])
    right = processor(image, rows, masks, padding_side="right")
    assert right["attention_mask"][1].tolist() == sorted(right["attention_mask"][1].tolist(), reverse=True)


def test_lists_instead_of_tensors(processor, image, mask):
    inputs = processor(image, ["<IMG_CONTEXT><mask>", "b"], [mask], return_tensors=None, padding=False)
    assert [len(row) for row in inputs["input_ids"]] == [4 + 1 + T, 1]
    assert isinstance(inputs["input_ids"][0], list)


def test_masks_written_out_stand_for_themselves(processor, mask):
    first, second = processor.masks_to_text([mask, ~mask])
    written = processor(None, f"a{first}b{second}")
    assert torch.equal(written["input_ids"], processor(None, "a<mask>b<mask>", [mask, ~mask])["input_ids"])


def test_token_types_on_request(processor, image):
    inputs = processor(image, "a<IMG_CONTEXT>b", return_mm_token_type_ids=True)
    assert inputs["mm_token_type_ids"].tolist() == [[0, 1, 1, 1, 1, 0]]


def test_tiles_multiply_image_tokens(processor):
    inputs = processor(Image.new("RGB", (40, 20)), "<IMG_CONTEXT>", images_kwargs={"crop_to_patches": True})
    tiles = inputs["pixel_values"].shape[0]
    assert tiles > 1
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4 * tiles
    assert "num_patches" not in inputs


@pytest.mark.parametrize(
    ("text", "images", "masks", "message"),
    [
        ("<mask>", 0, 0, "holds 1 <mask>, but 0 masks"),
        ("a", 0, 1, "holds 0 <mask>, but 1 masks"),
        ("<mask><mask>", 0, 1, "holds 2 <mask>, but 1 masks"),
        ("<IMG_CONTEXT>", 0, 0, "holds 1 <IMG_CONTEXT>, but 0 images"),
        ("<IMG_CONTEXT><IMG_CONTEXT>", 1, 0, "holds 2 <IMG_CONTEXT>, but 1 images"),
        ("a", 1, 0, "holds 0 <IMG_CONTEXT>, but 1 images"),
        ("<visual token 000001>", 0, 0, "outside any picture"),
        ("<gen_start> and so on", 0, 0, "followed by 0 visual tokens where a picture has 21"),
        ("<gen_start><visual token 000001>", 0, 0, "after 1 of 21"),
    ],
)
def test_markers_must_match(processor, image, mask, text, images, masks, message):
    with pytest.raises(ValueError, match=message):
        processor([image] * images, text, [mask] * masks)


def test_every_row_must_match_its_own_items(processor, mask):
    with pytest.raises(ValueError, match="row 0.*holds 1 <mask>, but 0 masks"):
        processor(None, ["<mask>", "a"], [[], [mask]])
    with pytest.raises(ValueError, match="masks for 1 rows, but 2 rows of text"):
        processor(None, ["<mask>", "a"], [[mask]])


def test_mask_must_have_the_size_of_its_image(processor, image, mask):
    with pytest.raises(ValueError, match="mask is 20x10.*its image 10x20"):
        processor(image, "<IMG_CONTEXT><mask>", mask.T)
    two = processor([image, image.rotate(90, expand=True)], "<IMG_CONTEXT><IMG_CONTEXT><mask>", mask.T)
    assert two["pixel_values"].shape[0] == 2  # of two images nothing says which one is meant


def test_what_is_not_handled_is_refused(processor, image):
    with pytest.raises(ValueError, match="text is missing"):
        processor(image)
    with pytest.raises(ValueError, match="neither videos nor audio"):
        processor(None, "a", videos=[image])


def test_too_long_for_the_context(toys, image, mask):
    processor = toys.processor(toys.tokenizer(model_max_length=30))
    assert processor(None, "a" * 30)["input_ids"].shape == (1, 30)
    with pytest.raises(ValueError, match="31 tokens, 1 more than the context of 30"):
        processor(None, ["a", "a" * 31])
    assert processor(None, "a" * 31, truncation=True)["input_ids"].shape == (1, 30)


@pytest.mark.parametrize("before", ["ab", "abcd", "abcde", "abcdef"])
@pytest.mark.parametrize("marker", ["<mask>", "<IMG_CONTEXT>"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_never_cuts_a_picture(toys, image, mask, before, marker, side):
    """Five tokens are kept: of the text and nothing, the beginning or, from the left, the end of the picture."""
    processor = toys.processor(toys.tokenizer(truncation_side=side), image_seq_length=6)
    text = before + marker if side == "right" else marker + before
    images, masks = (None, mask) if marker == "<mask>" else (image, None)
    with pytest.raises(ValueError, match="truncation would cut"):
        processor(images, text, masks, truncation=True, max_length=5)


def test_truncation_may_cut_text(processor, mask):
    inputs = processor(None, "<mask>abcdef", mask, truncation=True, max_length=1 + T + 2)
    assert processor.tokenizer.decode(inputs["input_ids"][0, -2:]) == "ab"


# ---------------------------------------------------------------------- conversations


def test_template(processor, image):
    user = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "see "}, {"type": "mask"}]}
    asked = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nHi<|im_end|>\n"
    assert processor.apply_chat_template([user], add_generation_prompt=True) == asked + "<|im_start|>assistant\n"
    answered = asked + "<|im_start|>assistant\nsee <mask><|im_end|>\n"
    assert processor.apply_chat_template([user, answer]) == answered
    system = {"role": "system", "content": "Be kind."}
    assert processor.apply_chat_template([system, user]) == "<|im_start|>system\nBe kind.<|im_end|>\n" + asked


def test_bos_is_written_once_where_the_tokenizer_writes_one(toys):
    special = {**toys.special, "unused": "<s>"}
    plain = toys.processor(toys.tokenizer(special=special, bos_token="<s>"))
    assert not plain.apply_chat_template([{"role": "user", "content": "a"}]).startswith("<s>")
    tokenizer = toys.tokenizer(special=special, bos_token="<s>")
    tokenizer.add_bos_token = True
    with_bos = toys.processor(tokenizer)
    for options in ({}, {"add_special_tokens": False}):
        ids = chat(with_bos, [{"role": "user", "content": "a"}], processor_kwargs=options)["input_ids"]
        assert (ids == tokenizer.bos_token_id).sum() == 1 and ids[0, 0] == tokenizer.bos_token_id


def test_conversation_holds_masks_of_every_form(processor, image, mask, tmp_path):
    Image.fromarray(mask).save(tmp_path / "m.png")
    expected = picture(processor, processor.encode_masks(mask)[0].tolist())
    for block in ({"mask": mask}, {"mask": torch.from_numpy(mask)}, {"path": str(tmp_path / "m.png"), "mask": None}):
        conversation = [
            {"role": "user", "content": [{"type": "image", "image": image, "text": None}]},
            {"role": "assistant", "content": [{"type": "mask", **block}]},
        ]
        inputs = chat(processor, conversation)
        row = inputs["input_ids"][0].tolist()
        start = row.index(processor.gen_start_token_id)
        assert row[start : start + 1 + T] == expected
        assert inputs["pixel_values"].shape == (1, 3, 8, 8)


def test_masks_beside_a_conversation_and_in_user_turns(processor, mask):
    conversation = [{"role": "user", "content": [{"type": "mask"}, {"type": "text", "text": "this"}]}]
    beside = chat(processor, conversation, processor_kwargs={"masks": [mask]})
    conversation[0]["content"][0]["mask"] = mask
    assert torch.equal(beside["input_ids"], chat(processor, conversation)["input_ids"])


def test_assistant_mask(processor, image, mask):
    short = processor.build_segmentation_conversation(image, "dog", mask)
    long = short + [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
    inputs = chat(processor, [short, long], return_assistant_tokens_mask=True, return_tensors="pt")
    drawn = picture(processor, processor.encode_masks(mask)[0].tolist())
    before, after = (text_ids(processor, text) for text in ("Sure, the segmentation result: ", ".<|im_end|>"))
    said = [before + drawn + after, before + drawn + after + text_ids(processor, "No.<|im_end|>")]
    for ids, marked, expected in zip(inputs["input_ids"], inputs["assistant_masks"], said, strict=True):
        assert ids[marked == 1].tolist() == expected


def test_prefilled_answer(processor, image):
    conversation = processor.build_segmentation_conversation(image, "dog")
    conversation.append({"role": "assistant", "content": "Sure: <gen_start>"})
    ids = chat(processor, conversation, continue_final_message=True)["input_ids"][0].tolist()
    assert ids[-1] == processor.gen_start_token_id


@pytest.mark.parametrize("marker", ["<mask>", "<IMG_CONTEXT>", "<gen_start>", "<visual token 000003>"])
def test_user_text_cannot_smuggle_pictures_in(processor, image, mask, marker):
    conversation = processor.build_segmentation_conversation(image, f"the {marker} dog", mask)
    with pytest.raises(ValueError, match="holds 2|broken picture"):
        chat(processor, conversation)
    with pytest.raises(ValueError, match="holds 2|broken picture"):
        chat(processor, [conversation, processor.build_segmentation_conversation(image, "dog", mask)])


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
def test_an_image_that_is_asked_about_several_times_is_prepared_once(processor, monkeypatch, return_tensors):
    images = [Image.effect_noise((20, 30), 90), Image.effect_noise((40, 30), 90)]
    asked = [images[0], images[1], images[0], images[0]]
    copies = [image.copy() for image in asked]
    prepared, prepare = [], processor._process_images

    def count(some, **options):
        prepared.extend(some)
        return prepare(some, **options)

    monkeypatch.setattr(processor, "_process_images", count)
    rows = [
        processor.apply_chat_template(
            [processor.build_segmentation_conversation(image, "the dog") for image in some],
            tokenize=True, return_dict=True, return_tensors=return_tensors,
        )
        for some in (asked, copies)
    ]  # fmt: skip
    assert len(prepared) == 2 + 4
    assert type(rows[0]["pixel_values"]) is type(rows[1]["pixel_values"])
    for name in rows[1]:
        np.testing.assert_array_equal(rows[0][name], rows[1][name])
    assert not np.array_equal(rows[0]["pixel_values"][0], rows[0]["pixel_values"][1])


def test_sanitized_user_text_is_plain(processor, image):
    conversation = processor.build_segmentation_conversation(image, "the <IMG_CONTEXT> <gen_start> dog")
    inputs = chat(processor, conversation, sanitize_control_tokens=True)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    assert (inputs["input_ids"] == processor.gen_start_token_id).sum() == 0


def test_unknown_or_double_content(processor, image):
    with pytest.raises(Exception, match="unknown content type: video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(ValueError, match="more than one source"):
        chat(processor, [{"role": "user", "content": [{"type": "image", "image": image, "path": "a.png"}]}])


def test_wording(toys, image, mask):
    processor = toys.processor(segmentation_prompt="Cut out {prompt}!", segmentation_answer="{mask}")
    question, answer = processor.build_segmentation_conversation(image, " {the} dog ", mask)
    assert question["content"] == [{"type": "image", "image": image}, {"type": "text", "text": "Cut out {the} dog!"}]
    assert answer == {"role": "assistant", "content": [{"type": "mask", "mask": mask}]}
    for empty in ("", "  ", None):
        with pytest.raises(ValueError, match="prompt is empty"):
            processor.build_segmentation_conversation(image, empty)
    with pytest.raises(ValueError, match="half of a UTF-16 pair"):  # as json.loads makes it of a broken emoji
        processor.build_segmentation_conversation(image, "the \ud83d dog")
    for wording in ({"segmentation_prompt": "Cut!"}, {"segmentation_answer": "Done."}):
        with pytest.raises(ValueError, match="must hold"):
            toys.processor(**wording)


def test_picture_answer_ids(processor, image, mask):
    """They are what a training example has after the prompt, without its codes and without what follows its end."""
    conversation = processor.build_segmentation_conversation(image, "the cup", mask)
    whole = chat(processor, conversation)["input_ids"][0].tolist()
    prompt = chat(processor, conversation[:1], add_generation_prompt=True)["input_ids"][0].tolist()
    answer = [token for token in whole[len(prompt) :] if not processor._pictures.is_visual(np.array(token))]
    ids = processor.picture_answer_ids
    assert whole[: len(prompt)] == prompt and answer[: len(ids)] == ids
    assert ids.count(processor.gen_start_token_id) == 1 and len(ids) > 2
    assert processor.tokenizer.decode(answer[len(ids) :]).strip() == ""
    assert processor.whole_scales[-1] == processor.num_visual_tokens


@pytest.mark.parametrize(
    ("text", "found"), [([], "an empty list"), (5, "int"), ([None, "a"], "NoneType, str"), (b"a", "bytes")]
)
def test_text_that_is_none(processor, text, found):
    with pytest.raises(ValueError, match=f"text must be a string, or a list of at least one; got {found}"):
        processor(text=text)
