"""Evaluation by free generation, as training uses it: everything in memory."""

import numpy as np
import pytest
import tiny_scenes
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_recipes import train_scenes
from trl_recipes.evaluate import load_model
from trl_recipes.evaluation.answers import draw, evaluate_expressions, union
from trl_recipes.evaluation.predictions import ModelPredictor
from trl_recipes.scenes import flat_expressions
from trl_recipes.tasks import Sample, load_task


@pytest.fixture
def learned(learned_folder):
    """A model that knows the first scene, and its processor."""
    return AutoModelForImageTextToText.from_pretrained(learned_folder), AutoProcessor.from_pretrained(learned_folder)


@pytest.fixture(scope="module")
def requests(known_scenes):
    """Two masks, one that is not there, a mask."""
    return flat_expressions(known_scenes, 4)


def test_every_expression_counts_under_its_kind(learned, requests):
    found = evaluate_expressions(*learned, requests)
    kinds = [request["kind"] for request in requests]
    assert kinds == ["colour", "colour", "none", "relation"]
    assert found["count"] == 4 and found["n_acc"] == found["t_acc"] == 1
    assert {name for name in found if name.startswith("giou_")} == {"giou_colour", "giou_none", "giou_relation"}
    assert found["giou_none"] == 1
    mean = (2 * found["giou_colour"] + found["giou_none"] + found["giou_relation"]) / 4
    assert found["giou"] == pytest.approx(mean)


def test_the_numbers_are_those_of_the_masks_drawn_one_by_one(learned, requests):
    ious, areas = [], np.zeros(2)
    for request in requests:
        (answer,) = draw(*learned, [request])
        drawn = union(answer) if answer["segments"] else np.zeros_like(request["mask"])
        both, either = (drawn & request["mask"]).sum(), (drawn | request["mask"]).sum()
        ious.append(both / either if either else 1)
        areas += both, either
    found = evaluate_expressions(*learned, requests, batch_size=3)
    assert found["giou"] == pytest.approx(np.mean(ious), abs=0.01) and np.mean(ious) < 0.95
    assert found["ciou"] == pytest.approx(areas[0] / areas[1], abs=0.01)


def test_a_model_that_never_draws_is_right_only_where_nothing_is(learned, requests):
    model, processor = learned
    model.generation_config.update(suppress_tokens=[processor.gen_start_token_id], max_new_tokens=4)
    assert evaluate_expressions(model, processor, requests) == {
        "giou": 0.25, "ciou": 0.0, "count": 4, "n_acc": 1.0, "t_acc": 0.0,
        "giou_colour": 0.0, "giou_none": 1.0, "giou_relation": 0.0,
    }  # fmt: skip


def test_a_model_that_always_draws_everything_is_wrong_where_nothing_is(learned, requests):
    model, processor = learned
    model.generation_config.update(sequence_bias=[[[processor.gen_start_token_id], 100.0]], max_new_tokens=1)
    torch.nn.init.constant_(processor.visual_tokenizer.decoder.conv_out.bias, 20)  # every picture is white
    first, second, _, last = (request["mask"].mean() for request in requests)
    assert evaluate_expressions(model, processor, requests) == pytest.approx({
        "giou": (first + second + last) / 4, "ciou": (first + second + last) / 4, "count": 4, "n_acc": 0, "t_acc": 1,
        "giou_colour": (first + second) / 2, "giou_none": 0, "giou_relation": last,
    })  # fmt: skip


def test_several_masks_in_one_answer_count_as_their_union(learned, requests):
    model, processor = learned
    model.generation_config.update(sequence_bias=[[[processor.gen_start_token_id], 100.0]], max_new_tokens=2)
    (answer,) = draw(model, processor, [requests[0]])
    first, second = (segment["mask"] for segment in answer["segments"])
    assert np.array_equal(union(answer), first | second)
    apart = np.eye(2, dtype=bool)
    assert union({"segments": [{"mask": apart}, {"mask": ~apart}]}).all()
    assert union({"segments": []}) is None


def test_the_question_is_the_image_its_prompt_and_the_bare_request(learned):
    model, processor = learned
    image, prompt = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    sample = Sample(id="x", text=" the disc\n", load_image=lambda: image, load_prompt=lambda: prompt)
    (turn,) = ModelPredictor(model, processor, "{request}", {}, {}).conversation(sample, image)
    *pictures, words = turn["content"]
    assert [one["image"] for one in pictures] == [image, prompt]
    assert words["text"] == processor.segmentation_prompt.replace("{prompt}", "the disc")


def test_what_was_learned_about_a_scene_is_answered_in_words_and_masks(bank_folder, tokenizer_folder, tmp_path):
    """Four questions and four expressions of one scene, learned by heart, then asked with nothing but the prompt."""
    recipe = tiny_scenes.scene_arguments(bank_folder, tokenizer_folder, overfit=4, schedule=["easy"])
    recipe.questions_per_scene = 4
    training = tiny_scenes.training_arguments(tmp_path, seed=tiny_scenes.SEED, max_steps=160, learning_rate=8e-3)
    train_scenes.main(recipe, training)
    model, processor = load_model(str(tmp_path), "auto", torch.device("cpu"))
    scene = tiny_scenes.scenes(bank_folder)
    scene.questions_per_scene = 4
    item = scene[0]
    samples = [
        Sample(id=str(i), text=q["text"], load_image=lambda: item["image"], kind=q["kind"], accepted=q["accepted"])
        for i, q in enumerate(item["questions"])
    ]
    answers = ModelPredictor.for_task(model, processor, load_task("scenes-vqa"), "standard")(samples)
    assert [one["text"] for one in answers] == [q["answer"] for q in item["questions"]]
    assert len(samples) == 4 and len({sample.kind for sample in samples}) >= 3
    assert not any(one["mask"] is not None for one in answers)
    drawn = draw(model, processor, [{"image": item["image"], **one} for one in item["expressions"]])
    assert [bool(one["segments"]) for one in drawn] == [one["kind"] != "none" for one in item["expressions"]]
