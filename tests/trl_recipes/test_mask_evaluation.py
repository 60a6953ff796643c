"""Validation asks as a user would, and counts what is drawn."""

import numpy as np
import own_masks
import pytest
import toy

from modeling_argenseg import ARGenSegForConditionalGeneration
from processing import ARGenSegProcessor
from trl_recipes.mask_data import load_mask_data
from trl_recipes.mask_evaluation import answer_rows, evaluate_rows


@pytest.fixture(scope="module")
def parts(toy_folder):
    return ARGenSegForConditionalGeneration.from_pretrained(toy_folder), ARGenSegProcessor.from_pretrained(toy_folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The photograph that the model knows, with its requests, one of which is for something that is not there."""
    folder = tmp_path_factory.mktemp("known")
    toy.photograph().save(folder / "toy.png")
    told = [
        {"image": "toy.png", "prompt": prompt, "mask": own_masks.rle(mask)}
        for prompt, mask in zip(toy.REQUESTS, toy.true_masks(), strict=True)
    ]
    told.append({"image": "toy.png", "prompt": "the whale", "mask": None})
    chat = [("human", "<image>\nPlease segment both shapes in this image."), ("gpt", "Sure: <mask><mask>.")]
    turns = [{"from": who, "value": text} for who, text in chat]
    both = [own_masks.rle(mask) for mask in toy.true_masks()]
    told.append({"image": "toy.png", "mask": both, "conversations": turns})
    return load_mask_data(own_masks.write_jsonl(folder / "known.jsonl", told), progress=False)


def test_every_request_is_answered_and_counted(parts, rows):
    model, processor = parts
    answers = answer_rows(model, processor, [rows[i] for i in range(4)])
    assert [len(answer["segments"]) for answer in answers] == [1, 1, 0, 2]
    expected = []
    for row, truths in zip(answers, [*[[mask] for mask in toy.true_masks()], [], toy.true_masks()], strict=True):
        # what the visual tokenizer can keep of the truth is what the model has learned
        decoded = [processor.decode_masks(processor.encode_masks(one), [one.shape])[1][0] for one in truths]
        drawn = [segment["mask"] for segment in row["segments"]]
        assert all((a == b).mean() > 0.9 for a, b in zip(drawn, decoded, strict=True))
        either, both = np.zeros((40, 60), bool), np.zeros((40, 60), bool)
        for mask in drawn:
            either = either | mask
        for mask in truths:
            both = both | mask
        expected.append((either & both).sum() / (either | both).sum() if (either | both).any() else 1.0)
    metrics, grid = evaluate_rows(model, processor, rows, batch_size=3, shown=2, progress=False)
    assert metrics["giou"] == pytest.approx(np.mean(expected)) and metrics["count"] == 4
    assert (metrics["n_acc"], metrics["t_acc"]) == (1, 1)
    shown_all = evaluate_rows(model, processor, rows, shown=4, progress=False)[1]
    assert shown_all.height == 2 * grid.height  # two lines of two


def test_the_mode_of_the_model_is_left_as_it_was(parts, rows):
    model, processor = parts
    for training in (True, False):
        model.train(training)
        evaluate_rows(model, processor, rows.select([0]), progress=False)
        assert model.training is training


def test_the_models_generation_configuration_decides_unless_options_are_given(parts, rows, monkeypatch):
    model, processor = parts
    seen, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **options: seen.append(options) or generate(**options))
    evaluate_rows(model, processor, rows.select([0]), progress=False)
    evaluate_rows(model, processor, rows.select([0]), progress=False, picture_logit_adjustment=0.3)
    assert "picture_logit_adjustment" not in seen[0] and seen[1]["picture_logit_adjustment"] == 0.3
