"""Masks in every accepted form mean the same, go to visual tokens and come back; all others are refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from processing import load_mask

MASK = np.zeros((3, 5), dtype=bool)
MASK[1, 2:4] = True
COMPRESSED = coco_mask.encode(np.asfortranarray(MASK.astype(np.uint8)))


def palette_image(colours):
    image = Image.fromarray(MASK.astype(np.uint8), mode="P")
    image.putpalette(colours)
    return image


@pytest.mark.parametrize(
    "source",
    [
        MASK,
        MASK.astype(np.uint8),
        MASK.astype(np.uint8) * 255,
        MASK.astype(np.float64),
        MASK[..., None],
        MASK[None],
        np.repeat(MASK[..., None] * 255, 3, axis=-1),
        torch.from_numpy(MASK),
        torch.from_numpy(MASK).to(torch.bfloat16)[None],
        Image.fromarray(MASK),
        Image.fromarray(MASK.astype(np.uint8)),
        Image.fromarray(MASK.astype(np.uint8) * 255).convert("RGB"),
        Image.fromarray(MASK.astype(np.uint8) * 255).convert("RGBA"),
        palette_image([0, 0, 0, 128, 0, 0]),
        palette_image([0, 0, 0, 255, 255, 255]),
        COMPRESSED,
        {"size": [3, 5], "counts": COMPRESSED["counts"].decode()},
        {"size": [3, 5], "counts": [7, 1, 2, 1, 4]},
    ],
)
def test_same_mask_from_every_form(source):
    loaded = load_mask(source)
    assert loaded.dtype == np.bool_
    assert np.array_equal(loaded, MASK)


def test_palette_whose_first_colour_is_white():
    assert np.array_equal(load_mask(palette_image([255, 255, 255, 0, 0, 0])), ~MASK)


def test_path_and_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(MASK.astype(np.uint8) * 255).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_mask(str(tmp_path / "a.png")), np.rot90(MASK, -1))
    with pytest.raises(ValueError, match=r"absent\.png"):
        load_mask(tmp_path / "absent.png")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (7 * np.arange(37).reshape(1, 37).repeat(2, axis=0), "37 distinct values; threshold it first: mask > 127"),
        (np.array([[0, 1, 2]]), "3 distinct values; a label map[?] Compare: mask == 2$"),
        (np.array([[0, 15, 255]]), "mask == 15; a soft mask[?] Then threshold it first: mask > 127"),
        (np.linspace(0, 1, 6).reshape(2, 3), r"6 distinct values; threshold it first: mask > 0\.5"),
        (np.array([[0, 7]]), r"\[0, 7\].*mask == 7"),
        (np.array([[1, 255]]), r"\[1, 255\]"),
        (np.array([[0, np.nan]]), "nan"),
        (np.zeros((0, 5)), "empty"),
        (np.zeros((2, 3, 4)), r"\(2, 3, 4\)"),
        (np.zeros(4), r"\(4,\)"),
        (Image.new("RGB", (2, 2), "red"), "colour"),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 9)), r"\(2, 2, 4\)"),
        ({"size": [3, 5], "counts": [7, 1]}, "cover 8 pixels, its size 3x5"),
        ({"size": [4, 5], "counts": "1"}, "cover 1 pixels, its size 4x5"),
        ({"size": [4, 5], "counts": b"1"}, "cover 1 pixels, its size 4x5"),
        ({"size": [4, 5], "counts": ""}, "cover 0 pixels, its size 4x5"),
        ({"size": [3, 6], "counts": COMPRESSED["counts"]}, "cover 15 pixels, its size 3x6"),
        ({"size": [3, 4], "counts": COMPRESSED["counts"]}, "cover 15 pixels, its size 3x4"),
        ({"size": [3, 5], "counts": COMPRESSED["counts"] + b"P"}, "COCO RLE.*cut off"),
        ({"size": [3, 5], "counts": "7 1 2"}, "COCO RLE.*character"),
        ({"size": [3, 5], "counts": "\u00e9"}, "COCO RLE"),
        ({"size": [1, 2], "counts": "2O1"}, "COCO RLE.*negative"),
        ({"size": [3, 5], "counts": 15}, "COCO RLE"),
        ({"size": [3, 5]}, "counts"),
        ({"counts": [15]}, "size"),
        ({"size": [0, 5], "counts": []}, "empty|COCO RLE"),
    ],
)
def test_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_mask(source)


@pytest.mark.parametrize("seed", range(4))
def test_long_runs_of_a_compressed_mask(seed):
    """Runs of many digits, and differences of both signs."""
    mask = np.random.default_rng(seed).random((301, 407)) < (0.5, 0.01, 0.0001, 0)[seed]
    mask[50:90, 100:300] = True
    assert np.array_equal(load_mask(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))), mask)


def test_values_that_cannot_be_compared_with_numbers():
    with pytest.raises(ValueError, match="holds the values"):
        load_mask(np.array([["0", "1"]]))


def test_no_mask_at_all():
    with pytest.raises(TypeError, match="int"):
        load_mask(3)


def test_there_and_back(processor, mask):
    # cells are 5 wide and 2.5 high in the mask; bicubic squashing leaves the middle of the cells clear
    ids = processor.encode_masks([mask, np.zeros_like(mask), np.ones_like(mask)])
    assert ids.dtype == torch.long
    assert ids.shape == (3, 21)
    assert (ids[1] == 0).all() and (ids[2] == 7).all()
    maps, masks = processor.decode_masks(ids, [mask.shape, (7, 3), None])
    assert [m.shape for m in maps] == [(10, 20), (7, 3), (16, 16)]
    assert [m.shape for m in masks] == [(10, 20), (7, 3), (16, 16)]
    assert np.array_equal(masks[0], mask)
    assert not masks[1].any() and masks[2].all()
    assert maps[0].dtype == np.float32 and maps[0].min() >= 0 and maps[0].max() <= 1
    assert processor.visual_tokenizer.decode_calls == 1


def test_threshold_is_applied_once_to_the_enlarged_map(processor):
    ids = torch.full((1, 21), 4)  # a grey of 4/7 everywhere
    assert processor.decode_masks(ids, [(5, 5)])[1][0].all()
    assert not processor.decode_masks(ids, [(5, 5)], threshold=0.6)[1][0].any()
    assert np.allclose(processor.decode_masks(ids, [(5, 5)])[0][0], 4 / 7)


def test_shrinking_averages(processor, mask):
    """A stripe of one cell in four: one pixel of target sees a quarter of white, wherever it samples."""
    stripe = np.zeros((16, 16), dtype=bool)
    stripe[:, :4] = True
    (shrunk,), _ = processor.decode_masks(processor.encode_masks(stripe), [(1, 1)])
    assert 0.1 < shrunk.item() < 0.3


def test_many_masks_are_encoded_in_portions_by_a_model_at_rest(toys, mask):
    model = toys.vq_model().train()
    processor = toys.processor(vq_model=model)
    assert not model.training
    assert processor.encode_masks([mask] * 40).shape == (40, 21)
    assert max(model.encode_batches) <= 16


def test_how_long_to_search_is_the_visual_tokenizers_affair_unless_it_is_said(toys, image, mask):
    model = toys.vq_model()
    toys.processor(vq_model=model).encode_masks(mask)
    assert model.search_steps is None
    toys.processor(vq_model=model).encode_masks(mask, search_steps=5)
    assert model.search_steps == 5
    processor = toys.processor(vq_model=model)
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"search_steps": 3}}
    processor.apply_chat_template(processor.build_segmentation_conversation(image, "the dog", mask), **options)
    assert model.search_steps == 3
    toys.processor(vq_model=model, num_scales=2).encode_masks(mask)
    assert model.search_steps == 0  # the scale it would mend is not drawn


def test_forms_of_several_masks(processor, mask):
    one = processor.encode_masks(mask)
    assert torch.equal(one, processor.encode_masks([mask]))
    assert torch.equal(processor.encode_masks(np.stack([mask] * 20)), one.repeat(20, 1))
    assert processor.encode_masks([]).shape == (0, 21)
    assert processor.decode_masks(torch.zeros(0, 21, dtype=torch.long)) == ([], [])


def test_encode_and_decode_refuse(processor, toys, mask):
    with pytest.raises(ValueError, match="mask is 10x20.*image 20x10"):
        processor.encode_masks([mask], image_sizes=[(20, 10)])
    with pytest.raises(ValueError, match="1 masks, but image sizes for 2"):
        processor.encode_masks([mask], image_sizes=[None, None])
    with pytest.raises(ValueError, match=r"\(N, 21\)"):
        processor.decode_masks(torch.zeros(1, 20, dtype=torch.long))
    for code in (-1, toys.num_codes, processor.visual_token_offset):
        with pytest.raises(ValueError, match="visual_token_offset"):
            processor.decode_masks(torch.full((1, 21), code))
    with pytest.raises(ValueError, match="target_sizes needs a list of 1"):
        processor.decode_masks(torch.zeros(1, 21, dtype=torch.long), [(1, 1), (2, 2)])
    with pytest.raises(ValueError, match="at least 1"):
        processor.decode_masks(torch.zeros(1, 21, dtype=torch.long), [(0, 1)])
    text_only = toys.processor(vq_model=None)
    with pytest.raises(ValueError, match="visual tokenizer"):
        text_only.encode_masks([mask])
    with pytest.raises(ValueError, match="visual tokenizer"):
        text_only.decode_masks(torch.zeros(1, 21, dtype=torch.long))


def test_resize_sizes(toys):
    with pytest.raises(ValueError, match="image size 16"):
        toys.processor(mask_resize_sizes=[16, 8])
    striped = np.arange(64) // 16 % 2 == np.zeros((64, 1))
    at_once = toys.processor().encode_masks([striped])[0, -16:].view(4, 4)
    assert at_once.tolist() == [[7, 0, 7, 0]] * 4
    through_2 = toys.processor(mask_resize_sizes=[2, 16]).encode_masks([striped])
    assert ((through_2 == 3) | (through_2 == 4)).all()  # squashed to 2x2 the stripes are an even grey
