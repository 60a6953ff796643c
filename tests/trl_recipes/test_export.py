"""Published folders: complete, half the size, and still the same model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from modeling_argenseg import ARGenSegForConditionalGeneration
from trl_recipes.evaluation.answers import draw, union
from trl_recipes.export import export, require_float32, store_in_half

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "visual_tokenizer/config.json",
    "visual_tokenizer/model.safetensors",
}


@pytest.fixture(scope="module")
def exported(learned_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub_cards")
    (folder / "README.md").write_text("the card")
    return export(learned_folder, folder)


def test_the_folder_holds_what_a_user_needs_and_nothing_of_the_training(exported):
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file() and path.suffix != ".py"}
    assert files == FILES | {"README.md"}
    assert (exported / "README.md").read_text() == "the card"


def test_whether_masks_follow_edges_is_a_setting_of_the_folder(learned_folder, exported, tmp_path):
    def said(folder):
        return AutoProcessor.from_pretrained(folder).follow_edges

    assert not said(exported)
    assert said(export(learned_folder, tmp_path / "edges", follow_edges=True))
    assert said(export(tmp_path / "edges", tmp_path / "again"))
    assert not said(export(tmp_path / "edges", tmp_path / "none", follow_edges=False))


def test_no_file_tells_where_it_was_made(exported, learned_folder):
    for name in FILES:
        content = (exported / name).read_bytes()
        for folder in (learned_folder, exported):
            assert str(folder).encode() not in content, name


def test_weights_are_half_precision_in_the_file(exported):
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (no dict)
    assert len(kinds) > 100
    assert {kind for name, kind in kinds.items() if ".quantizer." not in name} == {torch.float16}


def test_what_codes_depend_on_is_halved_only_where_no_number_changes(exported, learned_folder, tmp_path):
    name = Path("visual_tokenizer") / "model.safetensors"
    trained, published = load_file(learned_folder / name), load_file(exported / name)
    for key, tensor in trained.items():
        exact = torch.equal(tensor.half().float(), tensor)
        assert published[key].dtype == (torch.float16 if exact else torch.float32), key
        assert torch.equal(published[key].float(), tensor), key
    thirds = {"quantize.embedding.weight": torch.tensor([1 / 3, 2.0]), "decoder.bias": torch.tensor([0.5])}
    save_file(thirds, tmp_path / "model.safetensors")
    store_in_half(tmp_path / "model.safetensors", "")
    kept = load_file(tmp_path / "model.safetensors")
    assert kept["decoder.bias"].dtype == torch.float16 and torch.equal(
        kept["quantize.embedding.weight"], thirds["quantize.embedding.weight"]
    )


def test_the_model_loads_in_single_precision_and_whole(exported, learned_folder):
    model, info = AutoModelForImageTextToText.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    trained = ARGenSegForConditionalGeneration.from_pretrained(learned_folder).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        expected = trained[name] if ".quantizer." in name else trained[name].half().float()
        assert torch.equal(tensor, expected), name
    generation = model.generation_config
    assert generation.max_new_tokens == 48
    assert generation.picture_answer_ids == AutoProcessor.from_pretrained(exported).picture_answer_ids
    assert generation.eos_token_id == AutoProcessor.from_pretrained(exported).tokenizer.eos_token_id


def test_the_answers_are_those_of_the_trained_model(exported, learned_folder, known_scenes):
    item = known_scenes[0]
    samples = [{"image": item["image"], "text": expression["text"]} for expression in item["expressions"]]
    answers = []
    for folder in (exported, learned_folder):
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        answers.append(draw(model, processor, samples))
    assert any(union(answer) is not None for answer in answers[1])
    for ours, theirs in zip(*answers, strict=True):
        assert ours["text"] == theirs["text"] and len(ours["segments"]) == len(theirs["segments"])
        for one, other in zip(ours["segments"], theirs["segments"], strict=True):
            assert (one["mask"] != other["mask"]).mean() < 0.01
            assert one["score"] == pytest.approx(other["score"], abs=0.01)


def test_how_long_masks_are_searched_for_is_published(learned_folder, tmp_path):
    folder = export(learned_folder, tmp_path / "out", search_steps=7)
    assert AutoProcessor.from_pretrained(folder).visual_tokenizer.config.search_steps == 7
    assert AutoModelForImageTextToText.from_pretrained(folder).config.visual_tokenizer_config.search_steps == 7


def test_values_beyond_half_precision_are_refused(learned_folder, tmp_path):
    large = tmp_path / "large"
    shutil.copytree(learned_folder, large, ignore=shutil.ignore_patterns("checkpoint-*"))
    model = ARGenSegForConditionalGeneration.from_pretrained(large)
    torch.nn.init.constant_(model.model.scale_embedding.weight, 1e6)
    model.save_pretrained(large)
    with pytest.raises(ValueError, match="scale_embedding.weight holds values beyond"):
        export(large, tmp_path / "out")


def test_weights_are_replaced_not_written_over(exported, learned_folder, tmp_path):
    """Some systems do not write over a file that is still mapped, as that of weights that somebody uses."""
    file, in_use = tmp_path / "model.safetensors", tmp_path / "in_use.safetensors"
    shutil.copyfile(learned_folder / "model.safetensors", file)
    in_use.hardlink_to(file)
    before = in_use.read_bytes()
    store_in_half(file, ".quantizer.")
    assert in_use.read_bytes() == before != file.read_bytes() and len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_would_load_in_half_precision_is_refused(exported, tmp_path):
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    with pytest.raises(ValueError, match="bfloat16"):
        require_float32(tmp_path)


def test_the_logit_adjustment_survives_loading_and_saving(learned_folder, tmp_path):
    folder = export(learned_folder, tmp_path / "adjusted", picture_logit_adjustment=0.3)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.generation_config.picture_logit_adjustment == 0.3
    model.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").picture_logit_adjustment == 0.3
