"""Released checkpoints load as they are, and bad ones say what is wrong with them."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_released
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_argenseg import ARGenSegForConditionalGeneration, ARGenSegProcessor, VARTokenizer
from modeling_argenseg.conversion_argenseg import convert_config, convert_state_dict, revert_config
from modeling_argenseg.convert_checkpoint import convert_folder, count_parameters
from modeling_argenseg.released_checkpoint import PREFIX, released_shapes

CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "released"
    return folder, tiny_released.write_checkpoint(folder, num_shards=3)


@pytest.fixture
def broken(released, tmp_path):
    """A copy of the sharded checkpoint, to be damaged."""
    return shutil.copytree(released[0], tmp_path / "broken")


def shard(folder, number):
    return folder / f"model-{number:05d}-of-00003.safetensors"


@pytest.fixture(scope="module")
def golden_folder(golden, tmp_path_factory):
    """The golden fixture as it is laid out: the checkpoint, and its tokenizer beside it."""
    root = tmp_path_factory.mktemp("golden")
    (root / "checkpoint").mkdir()
    tiny_released.write_weights(root / "checkpoint", golden.released)
    (root / "checkpoint" / "config.json").write_text(json.dumps(golden.config_json))
    source = Path(__file__).parents[2].parent / "shared" / "golden" / "tiny256" / "tokenizer"
    shutil.copytree(source, root / "tokenizer")
    return root / "checkpoint"


class TestGolden:
    def test_weights_and_configuration(self, golden, golden_tokenizer, golden_folder):
        """What the other golden tests run on is what the folder gives."""
        model, info = ARGenSegForConditionalGeneration.from_pretrained(golden_folder, output_loading_info=True)
        expected = golden.model("sdpa")
        assert info == CLEAN and not model.training
        ours, theirs = model.config.to_dict(), expected.config.to_dict()
        for part in ("vlm_config", "visual_tokenizer_config"):
            ours[part] = {k: v for k, v in _without_dtype(ours[part]).items() if k != "_name_or_path"}
            theirs[part] = {k: v for k, v in _without_dtype(theirs[part]).items() if k != "_name_or_path"}
        differ = {key for key in theirs if ours[key] != theirs[key]}
        assert differ <= {"architectures", "dtype", "_name_or_path"}
        state = expected.state_dict()
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        tokenizer, info = VARTokenizer.from_pretrained(golden_folder, output_loading_info=True)
        vae = golden_tokenizer.state_dict()
        assert info == CLEAN and tokenizer.config.base_channels == 32
        assert all(torch.equal(tensor, vae[key]) for key, tensor in tokenizer.state_dict().items())

    def test_from_photograph_to_recorded_ids(self, golden, golden_folder):
        model = ARGenSegForConditionalGeneration.from_pretrained(golden_folder)
        processor = ARGenSegProcessor.from_pretrained(golden_folder)
        conversation = processor.build_segmentation_conversation(golden["prep/image_u8"].numpy(), "red cat")
        inputs = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        assert torch.equal(inputs["input_ids"], golden["infer/input_ids"])
        torch.testing.assert_close(inputs["pixel_values"], golden["vit/pixel_values"], atol=1e-6, rtol=0)
        sequences = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        drawn = sequences[sequences >= processor.visual_token_offset] - processor.visual_token_offset
        assert torch.equal(drawn[None], golden["infer/visual_ids"])
        assert sequences[0, -1] == model.generation_config.eos_token_id == golden.meta["ids"]["im_end"]
        answer = processor.post_process_segmentation(sequences, [(70, 100)], prompt_length=290)[0]
        assert answer["text"] == "S ." and answer["segments"][0]["mask"].shape == (70, 100)

    def test_masks_of_training(self, golden, golden_folder):
        processor = ARGenSegProcessor.from_pretrained(golden_folder)
        ids = processor.encode_masks(list(golden["prep/mask_u8"].numpy() > 0)[:1])
        clear = golden["train/mask_encode_margin"][0].flatten()[:680] > 1e-2
        assert torch.equal(ids[0][clear], golden["train/mask_token_ids"][0].flatten()[:680][clear])


def _without_dtype(config):
    """Nested configurations of a loaded model say the dtype."""
    if not isinstance(config, dict):
        return config
    return {key: _without_dtype(value) for key, value in config.items() if key != "dtype"}


@pytest.mark.parametrize("vae_in_pth", [False, True])
def test_loads_with_nothing_missing(tmp_path, vae_in_pth):
    tensors = tiny_released.write_checkpoint(tmp_path / "r", num_shards=1 + vae_in_pth, vae_in_pth=vae_in_pth)
    model, info = ARGenSegForConditionalGeneration.from_pretrained(tmp_path / "r", output_loading_info=True)
    assert info == CLEAN and model.config.image_token_id == 256 + 7
    native = convert_state_dict(tensors, model.config)
    state = model.state_dict()
    assert state.keys() == native.keys() and all(torch.equal(state[key], native[key]) for key in state)
    tokenizer = VARTokenizer.from_pretrained(tmp_path / "r")
    assert all(torch.equal(value, tensors[PREFIX + key]) for key, value in tokenizer.state_dict().items())
    if vae_in_pth:
        alone = VARTokenizer.from_pretrained(tmp_path / "r" / "vae_ch32v64z32.pth")
        assert all(torch.equal(value, tensors[PREFIX + key]) for key, value in alone.state_dict().items())
        searching = VARTokenizer.from_pretrained(tmp_path / "r" / "vae_ch32v64z32.pth", search_steps=5)
        assert searching.config.search_steps == 5


def test_options_of_from_pretrained(released):
    model = ARGenSegForConditionalGeneration.from_pretrained(
        str(released[0]), dtype=torch.bfloat16, attn_implementation="eager", scale_attention="block"
    )
    assert model.dtype == torch.bfloat16 and model.model.quantizer.embedding.weight.dtype == torch.float32
    assert model.config.scale_attention == "block" and model.config._attn_implementation == "eager"
    assert model.name_or_path == str(released[0])


def test_saves_as_native(released, tmp_path):
    model = ARGenSegForConditionalGeneration.from_pretrained(released[0])
    model.save_pretrained(tmp_path / "native")
    again, info = ARGenSegForConditionalGeneration.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert info == CLEAN and again.config.model_type == "argenseg"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("picture_length, side", [(680, 256), (2240, 512)])
def test_draws_at_both_picture_sizes(tmp_path, picture_length, side):
    tiny_released.write_checkpoint(tmp_path / "r", picture_length=picture_length)
    model = ARGenSegForConditionalGeneration.from_pretrained(tmp_path / "r")
    processor = ARGenSegProcessor.from_pretrained(tmp_path / "r")
    assert processor.mask_resize_sizes == ([512, 256] if side == 256 else [512])
    assert model.config.picture_length == processor.num_visual_tokens == picture_length
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    conversation = processor.build_segmentation_conversation(image, "the dog")
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True) + "<ge_start>"
    inputs = processor(images=[image], text=prompt)
    sequences = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    answer = processor.post_process_segmentation(sequences, [(20, 30)], prompt_length=inputs["input_ids"].shape[1])[0]
    assert answer["segments"][0]["mask"].shape == (20, 30)


def test_auto_classes_leave_the_type_of_all_internvl_repositories_alone(released):
    with pytest.raises(ValueError, match="internvl_chat"):
        AutoConfig.from_pretrained(released[0])
    with pytest.raises(ValueError, match="internvl_chat"):
        AutoModelForImageTextToText.from_pretrained(released[0])


def test_configuration_there_and_back():
    config = convert_config(tiny_released.config_json(), 263, tiny_released.visual_tokenizer_config())
    again = convert_config(revert_config(config), 263, tiny_released.visual_tokenizer_config())
    assert again.to_dict() == config.to_dict()
    config.scale_attention = "block"
    with pytest.raises(ValueError, match="the released layout holds"):
        revert_config(config)


@pytest.fixture(scope="module")
def config():
    """That of the 8B checkpoint."""
    llm = dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    released = tiny_released.config_json(vocab_size=96653, **llm)
    released["vision_config"] |= dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=448
    )
    released["force_image_size"] = 448
    return convert_config(released)


class TestFullSize:
    """The 8B model, on the meta device."""

    def test_shapes_and_parameter_count(self, config, capsys):
        shapes = released_shapes(config)
        assert shapes["language_model.output.weight"] == (96653, 4096)
        assert shapes["language_model.model.layers.31.attention.wqkv.weight"] == (6144, 4096)
        assert shapes["vision_model.encoder.layers.23.attn.qkv.weight"] == (3072, 1024)
        assert shapes["mlp1.1.weight"] == (4096, 4096) and shapes["pos_1LC"] == (1, 680, 4096)
        assert shapes["image_tokenizer.encoder.conv_in.weight"] == (160, 3, 3, 3)
        ids = (config.image_token_id, config.gen_start_token_id, config.gen_end_token_id, config.visual_token_offset)
        assert ids == (92546, 92554, 92555, 92557)
        model, visual = count_parameters(config)
        with capsys.disabled():
            print(f"\n8B: {model:,} numbers in the model, {visual:,} in the VQ-VAE ")
        assert 8.1e9 < model < 8.2e9 and 1.0e8 < visual < 1.2e8

    def test_every_released_name_has_a_home(self, config, golden):
        """The names of the fixture, with its layers repeated up to full size."""
        layers = {"language_model.model.layers": 32, "vision_model.encoder.layers": 24}
        names = set()
        for key in golden.released:
            stack = next((name for name in layers if key.startswith(name + ".")), None)
            for layer in range(layers[stack] if stack else 1):
                names.add(re.sub(r"layers\.\d+\.", f"layers.{layer}.", key) if stack else key)
        shapes = released_shapes(config)
        assert shapes.keys() == names
        small = released_shapes(golden.config())
        assert all(len(shapes[key]) == len(small[key]) for key in small)


class Exploit:
    def __reduce__(self):
        return os.system, ("touch code_was_run",)


def cut_shard(folder):
    os.truncate(shard(folder, 2), shard(folder, 2).stat().st_size - 100)


def cut_header(folder):
    os.truncate(shard(folder, 2), 20)


def drop_key(folder):
    """From the shard; the index still puts it there."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index["lvl_embed.weight"]
    save_file({key: tensor for key, tensor in load_file(file).items() if key != "lvl_embed.weight"}, file)


def drop_key_and_entry(folder):
    drop_key(folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    del index["weight_map"]["lvl_embed.weight"]
    file.write_text(json.dumps(index))


def _change(folder, change):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index["word_embed.bias"]
    tensors = load_file(file)
    tensors["word_embed.bias"] = change(tensors["word_embed.bias"])
    save_file(tensors, file)


def wrong_dtype(folder):
    _change(folder, lambda tensor: tensor.long())


def wrong_shape(folder):
    _change(folder, lambda tensor: tensor[:-1].clone())


def no_shard(folder):
    shard(folder, 3).unlink()


def pickle_with_code(folder):
    shutil.rmtree(folder)
    tiny_released.write_checkpoint(folder, vae_in_pth=True)
    torch.save({"encoder.conv_in.weight": Exploit()}, folder / "vae_ch32v64z32.pth")


def no_vae(folder):
    pickle_with_code(folder)
    (folder / "vae_ch32v64z32.pth").unlink()


def wrong_ids(folder):
    special = [*tiny_released.SPECIAL]
    special[-3:-1] = special[-2], special[-3]  # <ge_start> and <ge_end>, the other way round
    tiny_released.write_tokenizer(folder, special)


def no_config_field(folder):
    config = tiny_released.config_json()
    del config["llm_config"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))


BAD = {
    cut_shard: r"model-00002-of-00003.safetensors is cut: \S+ ends 100 bytes after the end",
    cut_header: "model-00002-of-00003.safetensors is no whole safetensors file",
    drop_key: r"model-\S+.safetensors lacks lvl_embed.weight, which model.safetensors.index.json puts there",
    drop_key_and_entry: "model.safetensors.index.json lacks lvl_embed.weight",
    wrong_dtype: r"model-\S+.safetensors: word_embed.bias is torch.int64",
    wrong_shape: r"model-\S+.safetensors: word_embed.bias has the shape \(31,\), config.json asks for \(32,\)",
    no_shard: "names the shard model-00003-of-00003.safetensors, and it is not in the folder",
    pickle_with_code: r"vae_ch32v64z32.pth is refused: it is broken, or holds more than tensors \((.|\n)*system",
    no_vae: "model.safetensors lacks image_tokenizer.*, and .* has no vae_",
    wrong_ids: "does not fit the weights: <ge_start> has the id 266, and the model has it at 265",
    no_config_field: "config.json is no configuration of a released ARGenSeg: KeyError('rope_theta')",
}


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_bad_checkpoints(broken, tmp_path, damage):
    damage(broken)
    message = BAD[damage].replace("KeyError('rope_theta')", r"KeyError\('rope_theta'\)")
    with pytest.raises(ValueError, match=message):
        ARGenSegForConditionalGeneration.from_pretrained(broken)
    with pytest.raises(ValueError, match=message):
        convert_folder(broken, tmp_path / "native")
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken"], "nothing is written"
    assert not os.path.exists("code_was_run")
