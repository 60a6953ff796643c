"""RefCOCO's family: `refer` files, PSALM's JSON, parquet mirrors; sentences alone and merged; boxes; no target."""

import json
import pickle

import numpy as np
import pytest
import tiny_tasks

from processing.mask_inputs import load_mask
from trl_recipes.tasks import MissingData, load_task, open_source, read_samples
from trl_recipes.tasks.refcoco import coco_image_id
from trl_recipes.tasks.safe_pickle import load_plain_pickle


def read(name, root, **options):
    return read_samples(open_source(load_task(name), root, **options))


def truth(sample):
    return load_mask(sample.load_mask())


def test_every_expression_of_the_split_is_a_sample(tmp_path):
    samples = read("refcoco", tiny_tasks.write_refer(tmp_path))
    assert [(sample.id, sample.text) for sample in samples] == [
        ("00000000-00", "the square"),
        ("00000000-01", "left box"),
        ("00000002-00", "the two parts"),
        ("00000005-00", "upper edge"),
        ("00000005-01", "the sky"),
    ]
    assert {sample.group for sample in samples} == {"581857"}
    assert [sample.kind for sample in samples] == ["small", "small", "medium", "large", "large"]


def test_masks_are_those_of_polygons_and_of_both_forms_of_rle(tmp_path):
    samples = read("refcoco", tiny_tasks.write_refer(tmp_path))
    for place, expected in ((0, tiny_tasks.square()), (2, tiny_tasks.two_parts()), (3, tiny_tasks.rows())):
        assert np.array_equal(truth(samples[place]), expected)
    (other,) = read("refcoco", tmp_path, split="testA")
    assert other.text == "a square" and other.group == "98304" and np.array_equal(truth(other), tiny_tasks.square())


def test_images_are_found_by_their_name_in_coco(tmp_path):
    samples = read("refcoco", tiny_tasks.write_refer(tmp_path))
    image = samples[0].load_image()
    assert image.mode == "RGB" and image.size == (tiny_tasks.WIDTH, tiny_tasks.HEIGHT)
    (tmp_path / "train2014" / tiny_tasks.coco_name(581857)).unlink()
    with pytest.raises(ValueError, match="cannot read the image .*000000581857.jpg"):
        samples[0].load_image()


def test_merged_asks_for_an_object_with_all_its_sentences(tmp_path):
    source = open_source(load_task("refcoco"), tiny_tasks.write_refer(tmp_path), protocol="merged")
    samples = read_samples(source)
    assert [sample.id for sample in samples] == ["00000000", "00000002", "00000005"]
    prompt = source.task.prompts["merged"].replace("{text}", samples[0].text)
    # to the letter as released: two spaces before the first sentence, a full stop behind each
    assert prompt == (
        " Given the following instructions:  the square. left box.; "
        "please perform referring segmentation on this image."
    )


@pytest.mark.parametrize("protocol", ["per-expression", "merged"])
def test_psalms_json_gives_the_same_samples(tmp_path, protocol):
    refer = read("refcoco", tiny_tasks.write_refer(tmp_path / "refer"), protocol=protocol)
    source = open_source(load_task("refcoco"), tiny_tasks.write_psalm(tmp_path / "psalm"), protocol=protocol)
    psalm = read_samples(source)
    assert source.format == "psalm"

    def told(samples):
        return sorted((s.text, s.kind, s.box, truth(s).tobytes(), s.load_image().tobytes()) for s in samples)

    assert told(refer) == told(psalm)


def test_the_mirror_with_annotations_in_columns_gives_the_same_samples(tmp_path):
    refer = read("refcoco", tiny_tasks.write_refer(tmp_path / "refer"))
    source = open_source(load_task("refcoco"), tiny_tasks.write_jxu(tmp_path / "hub"))
    mirror = read_samples(source)
    assert source.format == "parquet"
    for one, other in zip(refer, mirror, strict=True):
        assert (one.id, one.text, one.box, one.group) == (other.id, other.text, other.box, other.group)
        assert np.array_equal(truth(one), truth(other))
        assert one.load_image().tobytes() == other.load_image().tobytes()


def test_the_mirror_with_images_inside(tmp_path):
    samples = read("refcoco", tiny_tasks.write_lmms(tmp_path))
    assert [sample.text for sample in samples] == ["the square", "left box", "upper part", "lower part"]
    assert [sample.group for sample in samples] == ["581857", "581857", "581857", "98304"]
    assert np.array_equal(truth(samples[0]), tiny_tasks.square())
    assert np.array_equal(truth(samples[2]) | truth(samples[3]), tiny_tasks.two_parts())
    assert {sample.kind for sample in samples} == {"small"}  # from the area of the polygon: the mirror tells none
    for place, seed in ((0, 0), (1, 0), (2, 1), (3, 2)):  # each row has its own image
        assert samples[place].load_image().tobytes() == tiny_tasks.Image.open(
            tiny_tasks.BytesIO(tiny_tasks.jpeg(seed))
        ).convert("RGB").tobytes()  # fmt: skip


@pytest.mark.parametrize("write", [tiny_tasks.write_lmms, tiny_tasks.write_jxu])
def test_a_mirror_is_read_as_the_data_set_whose_folder_it_lies_in(write, tmp_path):
    """The mirrors of all three have files of the same names."""
    write(tmp_path, "refcoco+")
    assert len(read("refcoco_plus", tmp_path)) and len(read("rec_refcoco_plus", tmp_path))
    assert len(read("refcoco_plus", tmp_path / "refcoco+", images=tmp_path))  # as `hf download --local-dir` leaves it
    for name in ("refcoco", "refcocog", "rec_refcoco", "rec_refcocog"):
        with pytest.raises(MissingData):
            read(name, tmp_path)
    (tmp_path / "refcoco+").rename(tmp_path / "some")
    with pytest.raises(MissingData, match=r"data/val.*parquet is there, but several .* move it to refcoco\+/data/val"):
        read("refcoco_plus", tmp_path / "some")


def test_a_mirror_without_a_column_is_told(tmp_path):
    tiny_tasks.write_lmms(tmp_path)
    table = tiny_tasks.pq.read_table(tmp_path / "refcoco" / "data" / "val-00000-of-00002.parquet").drop_columns(
        "answer"
    )
    for path in (tmp_path / "refcoco" / "data").iterdir():
        tiny_tasks.pq.write_table(table, path)
    with pytest.raises(ValueError, match="has no column 'answer'; it has: question_id, image"):
        read("refcoco", tmp_path)


def test_boxes_are_corners(tmp_path):
    samples = read("rec_refcoco", tiny_tasks.write_refer(tmp_path))
    assert samples[0].box == (5, 5, 15, 15) and samples[2].box == (20, 5, 34, 24)


@pytest.mark.parametrize(
    ("name", "folder", "pickle_name", "split"),
    [
        ("refcoco_plus", "refcoco+", "refs(unc).p", "testA"),
        ("refcocog", "refcocog", "refs(umd).p", "val"),
        ("refcocog_google", "refcocog", "refs(google).p", "val"),
        ("refcoco_google", "refcoco", "refs(google).p", "val"),
    ],
)
def test_the_other_members_of_the_family_have_their_own_files(tmp_path, name, folder, pickle_name, split):
    tiny_tasks.write_refer(tmp_path, folder, pickle_name)
    assert len(read(name, tmp_path, split=split)) == (1 if split == "testA" else 5)


def test_grefcoco_has_several_targets_and_none(tmp_path):
    samples = read("grefcoco", tiny_tasks.write_grefcoco(tmp_path))
    assert [(sample.text, sample.kind) for sample in samples] == [
        ("all parts", "multi"),
        ("every thing", "multi"),
        ("the sky", "single"),
        ("the whale", "no-target"),
    ]
    assert np.array_equal(truth(samples[0]), tiny_tasks.square() | tiny_tasks.two_parts())
    assert not truth(samples[3]).any() and truth(samples[3]).shape == (tiny_tasks.HEIGHT, tiny_tasks.WIDTH)
    assert samples[3].load_image().size == (tiny_tasks.WIDTH, tiny_tasks.HEIGHT)


def test_files_of_different_data_sets_are_told(tmp_path):
    tiny_tasks.write_refer(tmp_path)
    path = tmp_path / "refcoco" / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][1:]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the reference 0 names 11, which .*instances.json does not hold"):
        read("refcoco", tmp_path)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_run_nothing(tmp_path, capsys, protocol):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([{"split": "val"}, Evil()], protocol))
    with pytest.raises(ValueError, match="names (__builtin__|builtins).print, and only dicts"):
        load_plain_pickle(path)
    assert capsys.readouterr().out == ""


def test_pickles_of_python_2_and_plain_containers_are_read(tmp_path):
    path = tmp_path / "refs.p"
    # a `str` of Python 2 with bytes of UTF-8, as `refer` was written
    path.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsa.")
    assert load_plain_pickle(path) == [{"sent": "caf\u00e9"}]
    plain = [{"a": (1, 2.5, None, True, "x")}, {3, 4}, frozenset([5])]
    path.write_bytes(pickle.dumps(plain, 2))
    assert load_plain_pickle(path) == plain
    path.write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="refs.p is not a pickle of plain data"):
        load_plain_pickle(path)


def test_ids_in_names_of_coco():
    names = ["COCO_train2014_000000581857_16.jpg", "COCO_train2014_000000581857.jpg", "000000581857.jpg"]
    assert [coco_image_id(name) for name in names] == [581857] * 3
    with pytest.raises(ValueError, match="no file name of COCO"):
        coco_image_id("photo_12.jpg")
