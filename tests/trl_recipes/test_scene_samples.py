"""Composed scenes as token streams: labels, pictures and batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from modeling_argenseg.code_search import edge_logits
from processing.segmentation_processing import mask_to_picture
from trl_recipes.masks import resize_like_pillow
from trl_recipes.scene_samples import (
    ABSENT,
    PictureEncoder,
    SceneCollator,
    SceneSamples,
    StreamWriter,
    model_inputs,
    unpack,
)
from trl_recipes.scenes import SceneDataset


@pytest.fixture(scope="module")
def collator(parts):
    return SceneCollator(parts[1].tokenizer.pad_token_id)


@pytest.fixture(scope="module")
def encoder(parts):
    return PictureEncoder(parts[1])


@pytest.fixture(scope="module")
def streams(samples, collator, encoder):
    """The first scene's streams with their codes, those that draw first: ids and labels, without padding."""
    batch = encoder(collator([samples[0]]))
    found = []
    for part in (batch, batch["words"]):
        for ids, labels, there in zip(part["input_ids"], part["labels"], part["attention_mask"].bool(), strict=True):
            found.append((ids[there], labels[there]))
    return found


@pytest.fixture(scope="module")
def expressions(known_scenes):
    """The first scene's requests in the order of its streams."""
    return sorted(known_scenes[0]["expressions"], key=lambda one: one["kind"] == "none")


def visual(processor, ids: torch.Tensor) -> torch.Tensor:
    """The codes among the ids of a stream."""
    return ids[ids >= processor.visual_token_offset] - processor.visual_token_offset


def conversation(processor, image, expression):
    """The request and its answer, as the processor takes them."""
    if expression["kind"] != "none":
        return processor.build_segmentation_conversation(image, expression["text"], expression["mask"])
    answer = [{"type": "text", "text": ABSENT.format(thing=expression["missing"])}]
    asked = processor.build_segmentation_conversation(image, expression["text"])
    return [*asked, {"role": "assistant", "content": answer}]


def test_streams_are_those_of_the_processor(parts, streams, known_scenes, expressions):
    processor = parts[1]
    image = known_scenes[0]["image"]
    inputs = processor.apply_chat_template(
        [conversation(processor, image, one) for one in expressions],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": False, "return_tensors": None},
    )
    assert len(streams) == len(expressions) == 4
    for (ids, labels), row, answer in zip(streams, inputs["input_ids"], inputs["assistant_masks"], strict=True):
        row, answer = torch.tensor(row), torch.tensor(answer, dtype=torch.bool)
        assert torch.equal(ids, row)
        assert torch.equal(labels, ids.masked_fill(~answer, -100))


@pytest.mark.parametrize("sizes", [[128], [40, 128], [448, 256]])
def test_pictures_of_masks_are_those_of_pillow(sizes):
    masks = np.random.default_rng(0).random((4, 256, 200)) < 0.3
    masks[0, :100] = True
    pictures = 255 * torch.from_numpy(masks).double()
    for side in sizes:
        pictures = resize_like_pillow(pictures, side)
    for mask, picture in zip(masks, pictures, strict=True):
        assert torch.equal(picture.float() / 255 * 2 - 1, mask_to_picture(mask, sizes)[0])


def test_images_are_those_of_the_processor(parts, samples, collator, encoder, known_scenes):
    expected = parts[1].image_processor(known_scenes[0]["image"], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder(collator([samples[0]]))["pixel_values"], expected, rtol=1e-4, atol=1e-4)


def test_questions_are_streams_that_draw_nothing(parts, known_scenes):
    scenes = SceneDataset(known_scenes.bank, known_scenes.config, known_scenes.seed, 4, 2, questions_per_scene=2)
    rows, questions = SceneSamples(scenes, parts[1])[0]["rows"], scenes[0]["questions"]
    assert questions
    tokenizer, spoken = parts[1].tokenizer, [row for row in rows if not row["draws"]]
    for question in questions:
        row = next(one for one in spoken if question["text"] in tokenizer.decode(one["input_ids"]))
        answer = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert answer == f"{question['answer']}<|im_end|>"


def test_a_sample_holds_a_picture_for_each_mask_and_none_for_what_is_missing(parts, samples, streams, known_scenes):
    processor = parts[1]
    assert [expression["kind"] for expression in known_scenes[0]["expressions"]].index("none") == 2
    assert [len(visual(processor, ids)) for ids, _ in streams] == [85, 85, 85, 0] and processor.num_visual_tokens == 85
    assert samples[0]["masks"].shape == (3, 256, 32)


def test_the_picture_in_the_stream_is_the_mask(parts, streams, expressions):
    processor = parts[1]
    for expression, (ids, _) in zip(expressions[:3], streams[:3], strict=True):
        codes = visual(processor, ids)[None]
        (grey,), _ = processor.decode_masks(codes)
        squashed = np.asarray(Image.fromarray(np.uint8(expression["mask"]) * 255).resize((8, 8), Image.BICUBIC)) / 255
        assert np.abs(grey - squashed).max() < 0.07  # codes are 0.125 apart in [0, 1]
        _, (mask,) = processor.decode_masks(codes, [expression["mask"].shape])
        assert (mask & expression["mask"]).sum() / (mask | expression["mask"]).sum() > 0.75


def test_fewer_scales_are_the_beginning_of_the_same_picture(parts, known_scenes, streams, collator):
    processor = parts[1]
    processor.num_scales = 3
    try:
        sample = SceneSamples(known_scenes, processor)[0]
        coarse = visual(processor, PictureEncoder(processor)(collator([sample]))["input_ids"][0])
    finally:
        processor.num_scales = None
    assert torch.equal(coarse, visual(processor, streams[0][0])[:21])


def test_an_answer_without_an_end_is_no_training_sample(parts):
    writer = StreamWriter(parts[1])
    writer.end = "\n"
    with pytest.raises(ValueError):
        writer([("what is this?", "A disc.")])


def test_the_collator_pads_on_the_right_and_says_whose_image(samples):
    pad = 9999
    batch = SceneCollator(pad)([samples[0], samples[1]])
    assert batch["pixel_values"].shape == (2, 3, 256, 256) and batch["pixel_values"].dtype == torch.uint8
    assert np.array_equal(batch["pixel_values"][1], samples[1]["image"])
    seen = 0
    for part, draws in ((batch, True), (batch["words"], False)):
        found = [(i, row) for i in (0, 1) for row in samples[i]["rows"] if row["draws"] == draws]
        assert part["image_index"].tolist() == [i for i, _ in found]
        longest, width = max(len(row["input_ids"]) for _, row in found), part["input_ids"].shape[1]
        assert width % 16 == 0 and longest <= width < longest + 16
        for i, (_, row) in enumerate(found):
            size = len(row["input_ids"])
            assert part["input_ids"][i].tolist() == row["input_ids"] + [pad] * (width - size)
            assert part["labels"][i].tolist() == row["labels"] + [-100] * (width - size)
            assert part["attention_mask"][i].tolist() == [1] * size + [0] * (width - size)
            seen += 1
    assert seen == 8 and len(batch["masks"]) == len(batch["input_ids"])


def test_one_batch_for_any_model_holds_all_streams(samples, collator, encoder):
    batch = model_inputs([samples[0], samples[1]], collator, encoder)
    parts = encoder(collator([samples[0], samples[1]]))
    assert len(batch["input_ids"]) == len(batch["pixel_values"]) == 8
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert torch.equal(batch["input_ids"][: len(parts["input_ids"]), : parts["input_ids"].shape[1]], parts["input_ids"])


def test_a_batch_is_filled_up_with_streams_that_teach_nothing(samples, encoder, parts):
    pad = parts[1].tokenizer.pad_token_id
    plain, filled = (encoder(SceneCollator(pad, 16, rows)([samples[0], samples[1]])) for rows in (1, 5))
    for small, large in ((plain, filled), (plain["words"], filled["words"])):
        count = len(small["labels"])
        assert len(large["labels"]) % 5 == 0 and len(large["image_index"]) == len(large["input_ids"])
        for name in ("input_ids", "labels", "attention_mask", "image_index"):
            assert torch.equal(large[name][:count], small[name])
        assert (large["labels"][count:] == -100).all() and torch.equal(large["input_ids"][count], small["input_ids"][0])


@pytest.fixture
def empty_is_usual(parts, monkeypatch):
    """Usage of the codes as in a trained tokenizer: the one that adds nothing is the most frequent."""
    quantizer = parts[1].visual_tokenizer.quantize
    hits = torch.zeros_like(quantizer.ema_vocab_hit_SV)
    hits[:, int(quantizer.embedding.weight.abs().argmin())] = 1
    monkeypatch.setitem(quantizer._buffers, "ema_vocab_hit_SV", hits)


def test_wrong_coarse_tokens_are_mended_by_finer_ones(parts, samples, collator, empty_is_usual):
    processor, batch = parts[1], collator([samples[0], samples[1]])
    torch.manual_seed(3)
    plain, slipped = PictureEncoder(processor)(batch), PictureEncoder(processor, slips=1.0)(batch)
    labelled = batch["labels"] >= processor.visual_token_offset
    assert torch.equal(plain["input_ids"][labelled], plain["labels"][labelled])
    ids, right = (slipped[name][labelled].view(-1, 85) for name in ("input_ids", "labels"))
    wrong = ids != right
    assert 0.1 < wrong[:, :21].float().mean() < 0.9 and not wrong[:, 21:].any()  # the last scale is what it must be
    assert torch.equal(slipped["input_ids"][~labelled], plain["input_ids"][~labelled])
    encoder, plain_codes = PictureEncoder(processor, slips=1.0), PictureEncoder(processor).encode(batch["masks"])[0]
    truth, error, broken = processor.visual_tokenizer.decode(plain_codes), 0.0, 0.0
    for _ in range(10):
        drawn, _ = encoder.encode(batch["masks"])
        unmended = torch.cat([drawn[:, :21], plain_codes[:, 21:]], dim=1)
        error += float((processor.visual_tokenizer.decode(drawn) - truth).abs().mean())
        broken += float((processor.visual_tokenizer.decode(unmended) - truth).abs().mean())
    assert 3 * error < broken, (error, broken)


def test_searched_tokens_are_nearer_to_the_masks_and_mend_slips_too(parts, samples, collator):
    processor, masks = parts[1], collator([samples[0], samples[1]])["masks"]
    tokenizer = processor.visual_tokenizer
    side = tokenizer.config.image_size
    pictures = F.interpolate(unpack(masks)[:, None], size=(side, side), mode="bicubic", antialias=True)
    white = (F.interpolate(pictures, scale_factor=2, mode="bicubic") > 0.5).float()

    def error(ids):
        *_, f_hat = tokenizer.quantize.accumulate(ids)
        return F.binary_cross_entropy_with_logits(edge_logits(tokenizer.decode_latent(f_hat)), white).item()

    plain, searched = (PictureEncoder(processor, search_steps=steps).encode(masks) for steps in (0, 16))
    assert torch.equal(*searched) and torch.equal(searched[0][:, :21], plain[0][:, :21])
    assert error(searched[0]) < error(plain[0])
    drawn, right = PictureEncoder(processor, slips=1.0, search_steps=4).encode(masks)
    assert torch.equal(drawn[:, 21:], right[:, 21:]) and not torch.equal(drawn[:, :21], right[:, :21])


def test_whole_scales_are_missed_or_those_of_another_picture(parts, samples, collator, empty_is_usual):
    processor = parts[1]
    quantizer = processor.visual_tokenizer.quantize
    usual = torch.cat([quantizer.log_frequency(k).argmax().expand(n) for k, n in enumerate((1, 4, 16))])
    encoder, masks = PictureEncoder(processor, slips=1.0), collator([samples[0], samples[1]])["masks"]
    torch.manual_seed(0)
    missed, others = 0, 0
    for _ in range(20):
        drawn, right = encoder.encode(masks)
        wrong = (drawn != right)[:, :21].any(1)
        missed += int((wrong & (drawn[:, :21] == usual).all(1)).sum())
        same = (drawn[:, None, :5] == right[None, :, :5]).all(-1).fill_diagonal_(False)
        others += int((wrong & same.any(1) & ~(drawn[:, :5] == usual[:5]).all(1)).sum())
    assert missed > 10 and others > 3  # of 120
