"""Saving, loading, building from parts, and agreement with the released preprocessing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, GotOcr2ImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from processing import ARGenSegProcessor
from processing.mask_inputs import mask_to_picture

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "tiny256" / "io.safetensors"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason="needs shared/golden/tiny256, which is not in the repository")


@pytest.fixture
def custom(toys):
    return toys.processor(
        image_seq_length=3,
        mask_resize_sizes=[32, 16],
        segmentation_prompt="Cut {prompt}.",
        segmentation_answer="Cut: {mask}",
        mask_marker="<|mask|>",
    )


def same_behaviour(a, b, image, mask):
    conversation = a.build_segmentation_conversation(image, "dog", mask)
    assert conversation == b.build_segmentation_conversation(image, "dog", mask)
    left, right = (p.apply_chat_template(conversation, tokenize=True, return_dict=True) for p in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_round_trip(custom, image, mask, tmp_path):
    with torch.no_grad():
        custom.visual_tokenizer.scale.fill_(0.5)  # weights that are not the initial ones
    custom.save_pretrained(tmp_path)
    assert {path.name for path in (tmp_path / "visual_tokenizer").iterdir()} >= {"config.json", "model.safetensors"}
    loaded = ARGenSegProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == custom.to_dict()
    assert loaded.chat_template == custom.chat_template
    assert same_behaviour(custom, loaded, image, mask)
    assert not same_behaviour(custom, ARGenSegProcessor.from_pretrained(tmp_path, image_seq_length=5), image, mask)


def test_sub_folder_and_given_visual_tokenizer(custom, toys, image, mask, tmp_path):
    custom.save_pretrained(tmp_path / "inner")
    assert same_behaviour(custom, ARGenSegProcessor.from_pretrained(tmp_path, subfolder="inner"), image, mask)
    given = toys.vq_model()
    assert ARGenSegProcessor.from_pretrained(tmp_path / "inner", vq_model=given).visual_tokenizer is given


def test_a_dtype_is_for_models_and_does_not_stop_it_from_being_saved(custom, image, mask, tmp_path):
    custom.save_pretrained(tmp_path)
    loaded = ARGenSegProcessor.from_pretrained(tmp_path, dtype=torch.float16)
    loaded.save_pretrained(tmp_path / "again")
    assert loaded.visual_tokenizer.dtype == torch.float32
    assert same_behaviour(custom, ARGenSegProcessor.from_pretrained(tmp_path / "again"), image, mask)


def test_visual_tokenizer_is_loaded_in_fp32(custom, tmp_path):
    custom.visual_tokenizer.to(torch.bfloat16)
    custom.save_pretrained(tmp_path)
    assert ARGenSegProcessor.from_pretrained(tmp_path).visual_tokenizer.dtype == torch.float32


def test_without_visual_tokenizer(toys, image, mask, tmp_path):
    toys.processor(vq_model=None).save_pretrained(tmp_path)
    assert not (tmp_path / "visual_tokenizer").exists()
    loaded = ARGenSegProcessor.from_pretrained(tmp_path)
    assert loaded.visual_tokenizer is None and loaded.num_visual_tokens is None
    assert loaded(image, "<IMG_CONTEXT>")["input_ids"].shape == (1, 4)
    with pytest.raises(ValueError, match="masks need a visual tokenizer"):
        loaded(None, "<mask>", mask)


def test_unknown_visual_tokenizer(custom, tmp_path):
    custom.save_pretrained(tmp_path)
    (tmp_path / "visual_tokenizer" / "config.json").write_text('{"model_type": "nobody_registered_this"}')
    with pytest.raises(ValueError, match="import modeling_argenseg first.*nobody_registered_this"):
        ARGenSegProcessor.from_pretrained(tmp_path)


def test_push_uploads_the_visual_tokenizer(custom, tmp_path, monkeypatch):
    seen = {}

    def push_to_hub(self, repo_id, **kwargs):
        self.save_pretrained(tmp_path / "upload", max_shard_size="1GB")  # what transformers does before the upload
        seen[repo_id] = kwargs

    monkeypatch.setattr(ARGenSegProcessor, "push_to_hub", push_to_hub)
    custom.save_pretrained(tmp_path / "local", push_to_hub=True, private=True)
    assert seen == {"local": {"private": True}}
    assert (tmp_path / "upload" / "visual_tokenizer" / "model.safetensors").exists()


def test_saving_leaves_the_processor_whole(custom, tmp_path):
    model = custom.visual_tokenizer
    custom.save_pretrained(tmp_path)
    assert "vq_model" not in repr(custom)
    assert custom.visual_tokenizer is model


def test_real_visual_tokenizer(toys, image, mask, tmp_path):
    modeling = pytest.importorskip("modeling_argenseg")
    torch.manual_seed(0)
    model = modeling.VARTokenizer(
        modeling.VARTokenizerConfig(
            image_size=16,
            base_channels=8,
            channel_multipliers=[1, 1, 1],
            num_res_blocks=1,
            norm_num_groups=4,
            latent_channels=4,
            vocab_size=toys.num_codes,
            patch_nums=[1, 2, 4],
        )
    )
    processor = toys.processor(vq_model=model)
    processor.save_pretrained(tmp_path)
    assert same_behaviour(processor, ARGenSegProcessor.from_pretrained(tmp_path), image, mask)
    ids = processor.encode_masks([mask, ~mask])
    assert ids.shape == (2, 21) and not torch.equal(ids[0], ids[1])
    size = (24, 32)  # larger than the picture: shrinking is antialiased, and would differ from `interpolate`
    _, masks = processor.decode_masks(ids, [size] * 2)
    expected = model.decode(ids).mean(dim=1, keepdim=True) / 2 + 0.5
    expected = torch.nn.functional.interpolate(expected, size, mode="bilinear")[:, 0] > 0.5
    assert np.array_equal(np.stack(masks), expected.numpy())


def test_default_image_processor(toys):
    processor = ARGenSegProcessor(tokenizer=toys.tokenizer())
    size, mean = processor.image_processor.size, processor.image_processor.image_mean
    assert (size["height"], size["width"]) == (448, 448) and list(mean) == list(IMAGENET_DEFAULT_MEAN)
    assert processor.image_seq_length == 256


def test_other_image_processors_work(toys, image):
    clip = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    inputs = ARGenSegProcessor(clip, toys.tokenizer(), image_seq_length=4)(image, "<IMG_CONTEXT>")
    assert inputs["pixel_values"].shape == (1, 3, 8, 8) and inputs["input_ids"].shape == (1, 4)


def test_tokenizers_that_do_not_fit(toys):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        ARGenSegProcessor()
    with pytest.raises(ValueError, match="not consecutive"):
        toys.processor(toys.tokenizer(visual_codes=[1, 0, *range(2, 8)]))
    with pytest.raises(ValueError, match="no visual tokens"):
        toys.processor(toys.tokenizer(visual_codes=[]))
    with pytest.raises(ValueError, match="has 6 visual tokens, but the visual tokenizer has 8"):
        toys.processor(toys.tokenizer(visual_codes=range(6)))
    with pytest.raises(ValueError, match="has 9 visual tokens, but the visual tokenizer has 8"):
        toys.processor(toys.tokenizer(visual_codes=range(9)))
    without = {name: token for name, token in toys.special.items() if name != "gen_start_token"}
    with pytest.raises(ValueError, match="no gen_start_token"):
        toys.processor(toys.tokenizer(special=without))
    released = toys.processor(toys.tokenizer(special={**without, "gen_start_token": "<ge_start>"}))
    assert released.gen_start_token == "<ge_start>"


@golden
def test_image_as_released(toys):
    tensors = load_file(GOLDEN)
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
    )
    processor = ARGenSegProcessor(image_processor, toys.tokenizer(), image_seq_length=4)
    inputs = processor(tensors["prep/image_u8"].numpy(), "<IMG_CONTEXT>")
    torch.testing.assert_close(inputs["pixel_values"][0], tensors["vit/pixel_values"][0], atol=1e-5, rtol=0)


@golden
def test_mask_as_released():
    tensors = load_file(GOLDEN)
    for mask, expected in zip(tensors["prep/mask_u8"], tensors["prep/mask_processed_u8"], strict=True):
        picture = mask_to_picture(mask.numpy() > 0, [512, 256])
        assert picture.shape == (3, 256, 256)
        assert torch.equal(((picture + 1) / 2 * 255).round().to(torch.uint8), expected.expand(3, -1, -1))
