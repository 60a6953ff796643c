"""Evaluation by free generation, on composed scenes and on folders of photographs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_recipes import evaluate_scenes
from trl_recipes.evaluate_scenes import draw, evaluate_expressions, real_samples, union
from trl_recipes.scenes import flat_expressions


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
    assert union({"segments": []}) is None


@pytest.fixture
def real_folder(tmp_path):
    """Two photographs, one of them grey, and three masks; `real.json` as it is published."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "images" / "red.jpg")
    Image.new("L", (30, 50), 90).save(tmp_path / "images" / "grey.png")
    items = []
    for name, image, size, kind, texts in (
        ("a", "red.jpg", (40, 60), "noun", ["the red thing", "it"]),
        ("b", "red.jpg", (40, 60), "plural", ["all of it"]),
        ("c", "grey.png", (50, 30), "none", ["the whale"]),
    ):
        mask = np.zeros(size, np.uint8)
        mask[5:20, 10:25] = 0 if kind == "none" else 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
        items.append(
            {"image": f"images/{image}", "mask": f"masks/{name}.png", "expressions": texts, "kind": kind, "tier": "A"}
        )
    (tmp_path / "real.json").write_text(json.dumps({"items": items}))
    return tmp_path


def test_every_expression_of_a_photograph_is_a_sample(real_folder):
    samples = list(real_samples(real_folder))
    told = [(sample["text"], sample["kind"]) for sample in samples]
    assert told == [("the red thing", "noun"), ("it", "noun"), ("all of it", "plural"), ("the whale", "none")]
    assert [sample["image"].size for sample in samples] == [(60, 40)] * 3 + [(30, 50)]
    assert all(sample["image"].mode == "RGB" for sample in samples)
    assert [sample["mask"].shape for sample in samples] == [(40, 60)] * 3 + [(50, 30)]
    assert [int(sample["mask"].sum()) for sample in samples] == [225, 225, 225, 0]
    assert samples[0]["mask"].dtype == bool and samples[0]["mask"][5:20, 10:25].all()


def run(monkeypatch, capsys, *arguments) -> dict:
    monkeypatch.setattr("sys.argv", ["evaluate_scenes", *map(str, arguments)])
    evaluate_scenes.main()
    return json.loads(capsys.readouterr().out)


def test_the_command_measures_photographs(learned_folder, real_folder, monkeypatch, capsys):
    found = run(monkeypatch, capsys, "--model", learned_folder, "--real", real_folder, "--batch-size", 3)
    assert found["count"] == 4 and found["data"] == str(real_folder)
    assert {"giou", "ciou", "n_acc", "t_acc", "giou_noun", "giou_plural", "giou_none"} < found.keys()
    assert 0.25 <= found["best_constant_giou"] < 1


def test_the_command_measures_scenes_and_writes_what_it_prints(
    learned_folder, bank_folder, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "result.json"
    arguments = ("--bank", bank_folder, "--split", "unseen", "--preset", "easy", "--seed", 5, "--expressions", 6)
    found = run(monkeypatch, capsys, "--model", learned_folder, *arguments, "--output", output)
    assert found["count"] == 6 and found["data"] == "unseen/easy seed 5"
    assert json.loads(output.read_text()) == found


@pytest.mark.parametrize("arguments", [[], ["--bank", "a", "--real", "b"]])
def test_the_command_wants_one_kind_of_data(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="one of --bank"):
        run(monkeypatch, capsys, "--model", "nowhere", *arguments)
