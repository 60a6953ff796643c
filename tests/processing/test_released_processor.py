"""The settings that a processor takes from a released folder."""

import json

import pytest
import tiny_released
from PIL import Image

import modeling_argenseg  # noqa: F401, registers the visual tokenizer
from processing import ARGenSegProcessor
from processing.released_processor import SYSTEM_MESSAGE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor") / "released"
    tiny_released.write_checkpoint(folder)
    return folder


@pytest.fixture
def edited(folder, tmp_path):
    """Links to the files of the folder, and a configuration with changes."""

    def edit(**changes):
        for file in folder.iterdir():
            if file.name != "config.json":
                (tmp_path / file.name).symlink_to(file)
        (tmp_path / "config.json").write_text(json.dumps(tiny_released.config_json() | changes))
        return tmp_path

    return edit


def test_released_conversation(folder):
    processor = ARGenSegProcessor.from_pretrained(folder)
    image = Image.new("RGB", (40, 20), "red")
    conversation = processor.build_segmentation_conversation(image, "the dog")
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == (
        f"<s><|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n<|im_start|>user\n<img><IMG_CONTEXT></img>\n Given the "
        "following instructions: the dog; please perform referring segmentation on this image.<|im_end|>\n"
        "<|im_start|>assistant\n"
    ).removeprefix("" if processor.chat_template.startswith("{{- bos_token") else "<s>")
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == processor.image_seq_length == 1
    own = [{"role": "system", "content": "Be brief."}, *conversation]
    assert SYSTEM_MESSAGE not in processor.apply_chat_template(own)


def test_mask_geometry_and_changes(folder):
    processor = ARGenSegProcessor.from_pretrained(folder)
    assert processor.mask_resize_sizes == [512, 256] and processor.visual_tokenizer.config.image_size == 256
    assert processor.visual_vocab_size == tiny_released.CODES
    assert processor.visual_token_offset == tiny_released.FIRST_VISUAL
    changed = ARGenSegProcessor.from_pretrained(folder, segmentation_prompt=" Please segment {prompt} in this image.")
    assert changed.segmentation_prompt == " Please segment {prompt} in this image."


def test_saved_as_native(folder, tmp_path):
    processor = ARGenSegProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path)
    again = ARGenSegProcessor.from_pretrained(tmp_path)
    assert again.mask_resize_sizes == [512, 256] and again.chat_template == processor.chat_template
    assert again.segmentation_prompt == processor.segmentation_prompt
    text = "<|im_start|>user\nthe dog<|im_end|>"
    assert again.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("changes", [{"template": "internvl2_0"}, {"pad2square": True}, {"dynamic_image_size": True}])
def test_unknown_ways_of_training_are_refused(edited, changes):
    with pytest.raises(ValueError, match=r"config\.json: only the released template internvl2_5"):
        ARGenSegProcessor.from_pretrained(edited(**changes))


def test_incomplete_configuration(edited):
    with pytest.raises(ValueError, match=r"config\.json is no configuration of a released ARGenSeg"):
        ARGenSegProcessor.from_pretrained(edited(vision_config={}, force_image_size=28))
