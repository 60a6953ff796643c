"""The small model of the recipes as it begins, and with another codebook."""

import pytest
import tiny_scenes
import torch
from PIL import Image

from processing import ARGenSegProcessor
from trl_recipes.scene_samples import PictureEncoder, SceneCollator, SceneSamples, model_inputs
from trl_recipes.tiny_model import adopt_visual_tokenizer, look_closer, sines
from trl_recipes.train_scenes import load_or_build


def test_the_model_draws_with_the_codebook_of_the_tokenizer(parts):
    model, processor = parts
    assert torch.equal(model.model.quantizer.embedding.weight, processor.visual_tokenizer.quantize.embedding.weight)
    assert model.config.visual_token_offset + 17 == model.config.text_config.vocab_size == len(processor.tokenizer)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".quantizer." in name or ".trunk." in name}


def test_the_vision_trunk_begins_with_imagenet_weights_or_from_scratch(
    parts, bank_folder, tokenizer_folder, known_scenes
):
    recipe = tiny_scenes.scene_arguments(bank_folder, tokenizer_folder, pretrained_trunk=False)
    stems = [load_or_build(recipe, known_scenes)[0].model.vlm.vision_tower.trunk.stem.weight for _ in range(2)]
    pretrained = parts[0].model.vlm.vision_tower.trunk.stem.weight
    assert not torch.equal(*stems) and not any(torch.equal(stem, pretrained) for stem in stems)


def test_cells_at_the_same_place_have_the_same_code_of_place():
    codes = sines([1, 3], 64)
    assert codes.shape == (10, 64)
    torch.testing.assert_close(codes[0], codes[5])  # the only cell and the middle one of nine
    assert torch.cdist(codes[1:], codes[1:]).fill_diagonal_(9).min() > 0.5


def test_the_text_tokenizer_writes_any_text_back(parts):
    tokenizer = parts[1].tokenizer
    text = "Please segment the  Äpfel 🍎 in this image.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("Please segment the disc in this image.")["input_ids"]) < 20  # its own wording is short


@pytest.fixture
def fresh(bank_folder, tokenizer_folder, known_scenes):
    """A model and processor that a test may change."""
    model, processor = load_or_build(tiny_scenes.scene_arguments(bank_folder, tokenizer_folder), known_scenes)
    model.config.num_scales = None
    return model, processor


def test_a_model_that_looks_closer_keeps_its_weights_and_its_tokens(fresh, tmp_path):
    model, processor = fresh
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    look_closer(model, processor, 384)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = type(model).from_pretrained(tmp_path), ARGenSegProcessor.from_pretrained(tmp_path)
    pixels = processor.image_processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 384, 384)
    assert model.get_image_features(pixels, return_dict=True).pooler_output.shape[1] == processor.image_seq_length
    with pytest.raises(ValueError, match="image_size"):
        look_closer(model, processor, 400)


def test_a_tokenizer_with_the_same_codes_changes_only_how_pictures_look(fresh, tmp_path):
    model, processor = fresh
    changed = tiny_scenes.grey_tokenizer()
    torch.nn.init.constant_(changed.decoder.conv_out.bias, -9)
    changed.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    same, processor = adopt_visual_tokenizer(model, processor, str(tmp_path))
    assert same is model and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert processor.visual_tokenizer.decoder.conv_out.bias.eq(-9).all()


def test_another_codebook_keeps_all_that_is_not_about_codes(fresh, known_scenes, tmp_path):
    model, processor = fresh
    tiny_scenes.grey_tokenizer(codes=33).save_pretrained(tmp_path)
    first, old = processor.visual_token_offset, {name: t.clone() for name, t in model.state_dict().items()}
    grown, processor = adopt_visual_tokenizer(model, processor, str(tmp_path))

    about_codes = ("embed_tokens", "lm_head", ".quantizer.", ".generation_projector.")
    for name, tensor in grown.state_dict().items():
        if not any(part in name for part in about_codes):
            assert torch.equal(tensor, old[name]), name
        elif tensor.shape[0] == first + 33:
            assert torch.equal(tensor[:first], old[name][:first])
            assert not torch.isclose(tensor[first : first + 17], old[name][first:]).any(1).all()
    assert torch.equal(grown.model.quantizer.embedding.weight[:, 0], torch.linspace(-2, 2, 33))
    assert processor.visual_vocab_size == 33 and processor.visual_token_offset == first
    assert len(processor.tokenizer) == grown.config.text_config.vocab_size == first + 33

    sample = SceneSamples(known_scenes, processor)[0]
    batch = model_inputs([sample], SceneCollator(processor.tokenizer.pad_token_id), PictureEncoder(processor))
    loss = grown(**batch).loss
    assert loss.isfinite()


def test_another_codebook_keeps_the_wording(fresh, tokenizer_folder):
    model, processor = fresh
    reworded = ARGenSegProcessor(
        processor.image_processor,
        processor.tokenizer,
        processor.visual_tokenizer,
        image_seq_length=processor.image_seq_length,
        segmentation_prompt="Show me {prompt}.",
        segmentation_answer="Here: {mask}",
    )
    _, processor = adopt_visual_tokenizer(model, reworded, str(tokenizer_folder))
    assert (processor.segmentation_prompt, processor.segmentation_answer) == ("Show me {prompt}.", "Here: {mask}")


@pytest.mark.parametrize("sides", [(1, 4, 8), (1, 2, 4, 8, 8)])
def test_scales_of_known_sides_keep_their_embeddings(fresh, tmp_path, sides):
    """The toy has scales of side 1, 2, 4 and 8: tokens 0, 1-4, 5-20 and 21-84."""
    model, processor = fresh
    tiny_scenes.grey_tokenizer(sides=sides, codes=33).save_pretrained(tmp_path)
    places = {1: range(1), 2: range(1, 5), 4: range(5, 21), 8: range(21, 85)}
    changed, processor = adopt_visual_tokenizer(model, processor, str(tmp_path))
    rows = [row for side in sides for row in places[side]]
    old, new = model.model, changed.model
    assert torch.equal(new.position_embedding.weight, old.position_embedding.weight[rows])
    levels = [(1, 2, 4, 8).index(side) for side in sides]
    assert torch.equal(new.scale_embedding.weight, old.scale_embedding.weight[levels])
    assert processor.num_visual_tokens == len(rows) == changed.config.visual_tokenizer_config.num_tokens


def test_the_same_codes_in_other_scales_are_another_tokenizer(fresh, tmp_path):
    old = fresh[1].visual_tokenizer
    new = tiny_scenes.grey_tokenizer(sides=(1, 4, 8))
    assert torch.equal(new.quantize.embedding.weight, old.quantize.embedding.weight)
    new.save_pretrained(tmp_path)
    model, processor = adopt_visual_tokenizer(*fresh, str(tmp_path))
    assert list(model.config.patch_nums) == list(processor.visual_tokenizer.config.patch_nums) == [1, 4, 8]


def test_fewer_codes_are_refused(fresh, tmp_path):
    tiny_scenes.grey_tokenizer(sides=(1, 2, 4, 8), codes=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="9 codes, fewer than the model's 17"):
        adopt_visual_tokenizer(*fresh, str(tmp_path))


def test_a_scale_without_embeddings_is_refused(fresh, tmp_path):
    tiny_scenes.grey_tokenizer(sides=(1, 3, 8), codes=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\[1, 3, 8\].*\[1, 2, 4, 8\]"):
        adopt_visual_tokenizer(*fresh, str(tmp_path))


def test_the_text_tokenizer_of_an_earlier_run_is_used_again(parts, bank_folder, tokenizer_folder, tmp_path):
    parts[1].tokenizer.save_pretrained(tmp_path)
    recipe = tiny_scenes.scene_arguments(bank_folder, tokenizer_folder, text_tokenizer=str(tmp_path))
    _, processor = load_or_build(recipe, None)  # reads no scene
    assert processor.tokenizer.get_vocab() == parts[1].tokenizer.get_vocab()


def test_a_text_tokenizer_for_another_codebook_is_refused(parts, bank_folder, tmp_path):
    parts[1].tokenizer.save_pretrained(tmp_path / "text")
    tiny_scenes.grey_tokenizer(codes=33).save_pretrained(tmp_path / "visual")
    recipe = tiny_scenes.scene_arguments(bank_folder, tmp_path / "visual", text_tokenizer=str(tmp_path / "text"))
    with pytest.raises(ValueError, match="17 visual tokens.*33 codes"):
        load_or_build(recipe, None)


def test_embedding_and_head_are_one(parts):
    model = parts[0]
    assert model.lm_head.weight is model.get_input_embeddings().weight
