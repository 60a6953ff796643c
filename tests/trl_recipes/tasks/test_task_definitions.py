"""Task definitions: whole, checked, and helpful when their data is not there."""

import hashlib
from dataclasses import replace

import pytest
import tiny_tasks

from trl_recipes.evaluation.scoring import MAKERS
from trl_recipes.tasks import READERS, MissingData, load_task, open_source, read_task, task_names, verify_archives
from trl_recipes.tasks.task import DEFINITIONS

WANTED = (
    "refcoco refcoco_plus refcocog refcoco_google refcocog_google grefcoco rec_refcoco rec_refcoco_plus rec_refcocog "
    "reasonseg coco_interactive ade20k coco_stuff pascal_context_59 pascal_context_459 pascal_voc_20 mvtec_ad pope "
    "scenes scenes-vqa real masks"
).split()


def test_all_benchmarks_are_there():
    assert task_names() == sorted(WANTED)


@pytest.mark.parametrize("name", task_names())
def test_every_definition_is_whole(name):
    task = load_task(name)
    assert task.version >= 1 and task.reader in READERS and task.source.strip() and task.layouts
    assert set(task.metrics) <= MAKERS.keys() | {"best_constant"}
    assert all(len(words) > 100 for words in task.protocols.values())  # in words, not by name alone
    assert all(set(counts) <= set(task.protocols) for counts in task.counts.values())


def test_referring_tasks_ask_every_expression_alone_unless_told_otherwise():
    for name in ("refcoco", "refcoco_plus", "refcocog", "grefcoco", "rec_refcoco"):
        assert list(load_task(name).protocols) == ["per-expression", "merged"]


def test_vocabularies_have_the_right_size():
    assert len(load_task("pascal_voc_20").options["names"]) == 20
    assert len(set(load_task("pascal_context_59").options["names"])) == 59
    assert len(load_task("coco_stuff").options["without"]) == 182 - 171


@pytest.mark.parametrize("name", task_names())
def test_missing_data_is_told_with_its_source_and_files(name, tmp_path):
    task = load_task(name)
    with pytest.raises(MissingData) as error:
        open_source(task, tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message and task.source.strip().splitlines()[0] in message
    for layout in task.layouts:
        for pattern in layout.find(tmp_path, task.splits[0]):
            assert f"MISSING  {pattern}" in message
    for archive in task.archives:
        assert archive["url"] in message


def test_a_file_that_is_there_is_told_apart(tmp_path):
    tiny_tasks.write_refer(tmp_path)
    (tmp_path / "refcoco" / "instances.json").unlink()
    with pytest.raises(MissingData) as error:
        open_source(load_task("refcoco"), tmp_path)
    assert "found    refcoco/refs(unc).p" in str(error.value)
    assert "MISSING  refcoco/instances.json" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "refcoco has no split 'test'; it has: val, testA, testB"),
        ({"protocol": "all"}, "no protocol 'all'; it has: per-expression, merged"),
        ({"options": {"seed": 1}}, "no option 'seed'; it has: kinds"),
    ],
)
def test_what_a_task_does_not_have_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        open_source(load_task("refcoco"), tiny_tasks.write_refer(tmp_path), **change)


def test_unknown_task():
    with pytest.raises(ValueError, match="no task 'refcocos'; there are: ade20k"):
        load_task("refcocos")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("reader:", "raeder:", "real.yaml: unknown field 'raeder'"),
        ("title:", "# title:", "real.yaml: .*title"),
        ("answer: mask", "answer: pixels", "the field 'answer' does not fit: 'pixels'"),
        ("targets: sometimes", "targets: maybe", "the field 'targets'"),
        ('per-expression: "{request}"', 'merged: "{request}"', "the field 'prompts'"),
        ('per-expression: "{request}"', 'per-expression: "segment it"', "the field 'prompts'"),
        ("name: real", "name: other", "the field 'name'"),
    ],
)
def test_a_broken_definition_is_told_with_its_field(tmp_path, old, new, message):
    text = (DEFINITIONS / "real.yaml").read_text()
    assert old in text
    (tmp_path / "real.yaml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_task(tmp_path / "real.yaml")


def test_archives_are_held_against_their_checksums(tmp_path):
    content = b"what was published"
    archive = {"file": "data.zip", "url": "https://example.org", "sha1": hashlib.sha1(content).hexdigest()}
    task = replace(load_task("real"), archives=(archive,))
    assert verify_archives(task, tmp_path) == []  # nothing there to check
    (tmp_path / "data.zip").write_bytes(content)
    assert verify_archives(task, tmp_path) == ["data.zip"]
    (tmp_path / "data.zip").write_bytes(content + b"!")
    with pytest.raises(ValueError, match="has the sha1 .* download it again"):
        verify_archives(task, tmp_path)


def test_folders_of_images(tmp_path):
    task = load_task("refcoco")
    tiny_tasks.write_refer(tmp_path)
    assert open_source(task, tmp_path).images == tmp_path / "train2014"
    assert open_source(task, tmp_path, images=tmp_path / "elsewhere").images == tmp_path / "elsewhere"
    nested = tmp_path / "images" / "mscoco" / "images" / "train2014"
    nested.mkdir(parents=True)
    assert open_source(task, tmp_path).images == nested
