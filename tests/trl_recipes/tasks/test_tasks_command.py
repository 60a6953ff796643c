"""`python -m trl_recipes.tasks`: lists, checks of downloads, and images that training must leave out."""

import json

import pytest
import tiny_tasks
from PIL import Image

from trl_recipes.tasks import __main__ as command
from trl_recipes.tasks import load_task, task_names
from trl_recipes.tasks.leakage import find_leaks, held_out_images, read_exclusions, write_exclusions


def run(capsys, *arguments) -> str:
    command.main([str(one) for one in arguments])
    return capsys.readouterr().out


def test_list_and_show(capsys):
    assert [line.split()[0] for line in run(capsys, "list").splitlines()] == task_names()
    assert "protocols:" in run(capsys, "show", "refcoco")


def test_prepare_reads_everything_and_counts(tmp_path, capsys):
    out = run(capsys, "prepare", "refcoco", "--data", tiny_tasks.write_psalm(tmp_path)).splitlines()
    told = json.loads(out[0].partition(": ")[2])
    assert out[0].startswith("val, per-expression (psalm)") and out[2:] == ["testA: not there", "testB: not there"]
    assert told["samples"] == 5 and told["expected"] == 10834 and not told["complete"]
    assert told["kinds"] == {"large": 2, "medium": 1, "small": 2} and told["empty_truths"] == 0


@pytest.mark.parametrize(
    ("name", "write", "samples", "empty"),
    [
        ("grefcoco", tiny_tasks.write_grefcoco, 4, 1),
        ("pascal_voc_20", tiny_tasks.write_voc, 40, 0),
        ("mvtec_ad", tiny_tasks.write_mvtec, 2, 1),
        ("pope", tiny_tasks.write_pope, 6, 0),
    ],
)
def test_prepare_knows_all_kinds_of_answers(tmp_path, capsys, name, write, samples, empty):
    arguments = ("--data", write(tmp_path), "--split", load_task(name).splits[0])
    told = json.loads(run(capsys, "prepare", name, *arguments).splitlines()[0].partition(": ")[2])
    assert (told["samples"], told["empty_truths"]) == (samples, empty)


def test_prepare_names_the_sample_at_fault(tmp_path, capsys):
    tiny_tasks.write_refer(tmp_path)
    path = tmp_path / "train2014" / tiny_tasks.coco_name(581857)
    Image.new("RGB", (40, 31)).save(path)
    with pytest.raises(SystemExit, match=r"sample 00000000-00: the truth is \(30, 40\), the image \(31, 40\)"):
        run(capsys, "prepare", "refcoco", "--data", tmp_path)
    path.write_bytes(b"broken")
    with pytest.raises(SystemExit, match="sample 00000000-00: cannot read the image"):
        run(capsys, "prepare", "refcoco", "--data", tmp_path)


def test_prepare_without_data(tmp_path, capsys):
    with pytest.raises(SystemExit, match="Where to get it"):
        run(capsys, "prepare", "refcoco", "--data", tmp_path)


@pytest.fixture
def annotations(tmp_path):
    """RefCOCO (val: 581857, testA and train: 98304) and gRefCOCO (val and train: 581857)."""
    tiny_tasks.write_refer(tmp_path)
    return tiny_tasks.write_grefcoco(tmp_path)


def test_images_of_all_validation_and_test_splits_are_held_out(annotations):
    images, read = held_out_images(annotations)
    assert images == {581857, 98304}  # 98304 is in train, too, but testA has it
    assert "refcoco/val" in read and "refcoco/testA" in read and "grefcoco/val" in read
    assert not any(name.startswith("refcocog") for name in read)


def test_a_mirror_of_one_data_set_is_not_read_as_its_siblings(tmp_path, capsys):
    tiny_tasks.write_lmms(tmp_path)
    assert held_out_images(tmp_path) == ({581857, 98304}, ["refcoco/val"])
    out = run(capsys, "leakage", "--data", tmp_path, "--output", tmp_path / "held_out.txt")
    assert "not read, and not in it: refcoco/testA, refcoco/testB, refcoco_plus/val," in out
    (tmp_path / "refcoco").rename(tmp_path / "mirror")
    with pytest.raises(SystemExit, match=r"data/val-\*.parquet may be of several: move it to refcoco/data/val-"):
        run(capsys, "leakage", "--data", tmp_path / "mirror", "--output", tmp_path / "held_out.txt")


def test_images_that_only_training_shows_are_not_held_out(tmp_path):
    tiny_tasks.write_refer(tmp_path)
    path = tmp_path / "refcoco" / "refs(unc).p"
    path.write_bytes(tiny_tasks.pickle.dumps([ref for ref in tiny_tasks.refs() if ref["split"] != "testA"], 2))
    assert held_out_images(tmp_path)[0] == {581857}


def test_lists_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "held_out.txt"
    write_exclusions(path, {7, 581857}, ["refcoco/val"])
    assert path.read_text() == "# COCO ids of the images of refcoco/val\n7\n581857\n"
    assert read_exclusions(path) == {7, 581857}
    path.write_text("7\nseven\n")
    with pytest.raises(ValueError, match="held_out.txt:2: 'seven' is no id"):
        read_exclusions(path)


@pytest.mark.parametrize(
    "name", ["COCO_train2014_000000581857.jpg", "train2017/000000581857.jpg", "COCO_train2014_000000581857_3.jpg"]
)
def test_a_training_file_that_shows_a_held_out_image_is_found_out(annotations, tmp_path, capsys, name):
    training, output = tmp_path / "train.jsonl", tmp_path / "held_out.txt"
    training.write_text(json.dumps({"image": "coco/train2014/COCO_train2014_000000000009.jpg"}) + "\n")
    arguments = ("leakage", "--data", annotations, "--output", output, "--training", training)
    assert "0 of them" in run(capsys, *arguments)
    assert read_exclusions(output) == {581857, 98304}
    with training.open("a") as file:
        file.write(json.dumps({"image": name}) + "\n")
    with pytest.raises(SystemExit, match="training data names images of validation or test splits"):
        run(capsys, *arguments)
    assert "1 of them, such as [581857]" in capsys.readouterr().out


def test_a_file_without_images_of_coco_proves_nothing(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"image": "photo.jpg"}\n')
    with pytest.raises(ValueError, match="names no image of COCO"):
        find_leaks(path, {1})


def test_leakage_without_annotations(tmp_path, capsys):
    with pytest.raises(SystemExit, match="none of refcoco, refcoco_plus"):
        run(capsys, "leakage", "--data", tmp_path, "--output", tmp_path / "held_out.txt")
