"""The other data sets, in the formats of their authors, and what all samples have in common."""

import json

import numpy as np
import own_masks
import pytest
import tiny_tasks
from datasets import Dataset, DatasetDict
from PIL import Image

from processing.mask_inputs import load_mask
from trl_recipes.tasks import MissingData, Sample, Samples, load_task, open_source, read_samples
from trl_recipes.tasks.samples import open_labels, open_mask, open_rgb, segmentation_rle
from trl_recipes.tasks.semantic import vocabulary


def read(name, root, **options):
    return read_samples(open_source(load_task(name), root, **options))


def test_reasonseg_paints_small_on_large_and_leaves_out_flags(tmp_path):
    first, second = read("reasonseg", tiny_tasks.write_reasonseg(tmp_path))
    assert (first.id, first.text, first.kind) == ("a", "the caf\u00e9", "short")
    assert (second.text, second.kind) == ("where could one sit?", "long")  # the first sentence
    expected = np.zeros((tiny_tasks.HEIGHT, tiny_tasks.WIDTH), bool)
    expected[5:15, 5:15] = True  # corners cut to whole pixels, outlines included
    assert np.array_equal(first.load_mask(), expected) and not first.load_ignore().any()
    ignored = np.zeros_like(expected)
    ignored[8:12, 8:12] = True  # the smallest, painted last
    expected[5:10, 12:21] = True  # overlapping targets count once
    assert np.array_equal(second.load_ignore(), ignored)
    assert np.array_equal(second.load_mask(), expected & ~ignored)


def test_reasonseg_names_the_file_and_field_at_fault(tmp_path):
    tiny_tasks.write_reasonseg(tmp_path)
    path = tmp_path / "ReasonSeg" / "val" / "a.json"
    path.write_text('{"text": ["x"], "shapes": []}')
    with pytest.raises(ValueError, match="a.json: the field 'is_sentence' is missing"):
        read("reasonseg", tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="a.json is not JSON"):
        read("reasonseg", tmp_path)


@pytest.mark.parametrize("split", ["point", "scribble", "mask"])
def test_interactive_prompts_are_shown_as_released(tmp_path, split):
    (sample,) = read("coco_interactive", tiny_tasks.write_interactive(tmp_path), split=split)
    assert sample.text == f"the object marked by the {split}" and sample.kind == split and sample.group == "5"
    prompt = np.asarray(sample.load_prompt())
    assert prompt.shape == (tiny_tasks.HEIGHT, tiny_tasks.WIDTH, 3)
    assert prompt[10, 12].tolist() == [255, 255, 255] and prompt.sum() == 3 * 255
    assert np.array_equal(load_mask(sample.load_mask()), tiny_tasks.square())


def test_interactive_boxes_are_told_in_words(tmp_path):
    (sample,) = read("coco_interactive", tiny_tasks.write_interactive(tmp_path), split="box")
    assert sample.text == "the object in the box [125, 167, 375, 500]"  # thousandths of 40 x 30 pixels
    assert sample.load_prompt is None


def test_semantic_asks_for_every_class_in_every_image(tmp_path):
    source = open_source(load_task("pascal_voc_20"), tiny_tasks.write_voc(tmp_path))
    samples = read_samples(source)
    assert len(samples) == 40 and [sample.label for sample in samples] == [*range(20)] * 2
    assert samples[0].text == "aeroplane" and samples[19].text == "tv monitor"
    assert [sample.group for sample in samples] == ["2007_000033"] * 20 + ["2007_000042"] * 20
    labels = samples[20].load_labels()
    assert labels[6, 6] == 1 and labels[22, 6] == 19 and labels[0, 0] == -1  # 255 is void


def test_ade20k_starts_at_one_and_takes_the_first_name(tmp_path):
    source = open_source(load_task("ade20k"), tiny_tasks.write_ade(tmp_path))
    samples = read_samples(source)
    assert len(samples) == 150 and samples[0].text == "thing 1" and samples[149].text == "thing 150"
    labels = samples[0].load_labels()
    assert labels[6, 6] == 0 and labels[22, 6] == 149 and labels[0, 0] == -1


def test_pascal_context_459_has_maps_of_16_bits(tmp_path):
    samples = read("pascal_context_459", tiny_tasks.write_context_459(tmp_path))
    labels = samples[0].load_labels()
    assert len(samples) == 459 and labels[6, 6] == 0 and labels[22, 6] == 458 and labels[0, 0] == -1


def test_coco_stuff_leaves_out_the_eleven_unused_things(tmp_path):
    source = open_source(load_task("coco_stuff"), tiny_tasks.write_stuff(tmp_path))
    numbers, names = vocabulary(source)
    assert len(names) == 171 and "thing 12" not in names and "thing 11" in names and "thing 91" not in names
    labels = read_samples(source)[0].load_labels()
    assert labels[6, 6] == 0 and labels[22, 6] == 170 and labels[0, 0] == -1
    assert numbers[-1] == 181


def test_a_label_that_is_no_class_is_told(tmp_path):
    tiny_tasks.write_voc(tmp_path)
    path = tmp_path / "pascal_voc_d2" / "annotations_pascal20" / "validation" / "2007_000033.png"
    Image.fromarray(np.full((5, 5), 20, np.uint8)).save(path)
    with pytest.raises(ValueError, match="2007_000033.png: the label 20 is neither a class nor void"):
        read("pascal_voc_20", tmp_path)[0].load_labels()
    Image.new("RGB", (5, 5)).save(path)
    with pytest.raises(ValueError, match=r"is no label map: it has the shape \(5, 5, 3\)"):
        open_labels(path)


def test_a_line_without_a_name_is_told(tmp_path):
    tiny_tasks.write_stuff(tmp_path)
    (tmp_path / "labels.txt").write_text("1: person\nbicycle\n")
    with pytest.raises(ValueError, match="labels.txt:2: no number and name in 'bicycle'"):
        read("coco_stuff", tmp_path)


def test_mvtec_has_nothing_to_segment_on_good_things(tmp_path):
    good, scratch = read("mvtec_ad", tiny_tasks.write_mvtec(tmp_path))
    assert good.id == "metal_nut/good/000" and good.text == scratch.text == "the defect of the metal nut"
    assert good.kind == "metal_nut" and not good.load_mask().any() and good.load_mask().shape == (30, 40)
    assert np.array_equal(scratch.load_mask(), tiny_tasks.square())
    (tmp_path / "metal_nut" / "ground_truth" / "scratch" / "000_mask.png").unlink()
    with pytest.raises(MissingData, match="000_mask.png is missing"):
        read("mvtec_ad", tmp_path)


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_masks_of_zeros_and_ones_are_read_as_everywhere(tmp_path, dtype):
    """A threshold at half of white took them for empty."""
    square = tiny_tasks.square()
    Image.fromarray(square.astype(dtype)).save(tmp_path / "mask.png")
    assert np.array_equal(open_mask(tmp_path / "mask.png"), square)
    labels = Image.fromarray(square.astype(np.uint8)).convert("P")
    labels.putpalette([0, 0, 0, 128, 0, 0])  # as label maps are coloured
    labels.save(tmp_path / "mask.png")
    assert np.array_equal(open_mask(tmp_path / "mask.png"), square)


def test_soft_edges_of_masks_are_thresholded(tmp_path):
    grey = tiny_tasks.square().astype(np.uint8) * 255
    grey[5], grey[14] = grey[5] // 2 + 1, grey[14] // 3
    Image.fromarray(grey).save(tmp_path / "mask.png")
    assert np.array_equal(open_mask(tmp_path / "mask.png"), grey > 127)
    Image.fromarray(tiny_tasks.square().astype(np.uint8) * 2).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask.png: the mask holds the values \[0, 2\]"):
        open_mask(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="cannot read the mask .*nothing.png"):
        open_mask(tmp_path / "nothing.png")


def test_pope_has_three_kinds_of_questions(tmp_path):
    samples = read("pope", tiny_tasks.write_pope(tmp_path))
    assert len(samples) == 6 and {sample.kind for sample in samples} == {"random", "popular", "adversarial"}
    first = read("pope", tmp_path, split="popular")[0]
    assert first.id == "popular-000001" and first.text == "Is there a snowboard in the image?" and first.answer == "yes"
    assert first.load_image().size == (40, 30) and first.load_mask is None
    path = tmp_path / "coco_pope_random.json"
    path.write_text(path.read_text() + '{"question_id": 3}\n')
    with pytest.raises(ValueError, match="coco_pope_random.json:3: no question of POPE"):
        read("pope", tmp_path)


def test_pope_has_any_characters_in_its_questions(tmp_path):
    tiny_tasks.write_pope(tmp_path)
    text = "Is there\u2028a dog\x85?"
    row = {"question_id": 3, "image": "COCO_val2014_000000310196.jpg", "text": text, "label": "no"}
    with (tmp_path / "coco_pope_random.json").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    assert read("pope", tmp_path, split="random")[2].text == text


@pytest.mark.parametrize("key", ["image", "mask", "expressions"])
def test_photographs_without_a_key_are_told_with_file_and_item(tmp_path, key):
    path = tiny_tasks.write_photographs(tmp_path / "data") / "real.json"
    items = json.loads(path.read_text())["items"]
    del items[1][key]
    path.write_text(json.dumps({"items": items}))
    with pytest.raises(ValueError, match=f"real.json, item 1: the key '{key}' needs a "):
        read("real", path.parent)
    path.write_text(json.dumps(items))
    with pytest.raises(ValueError, match="real.json: the key 'items' with a list is missing"):
        read("real", path.parent)


def test_photographs_may_do_without_kinds(tmp_path):
    path = tiny_tasks.write_photographs(tmp_path / "data") / "real.json"
    content = json.loads(path.read_text())
    del content["items"][0]["kind"]
    path.write_text(json.dumps(content))
    assert [sample.kind for sample in read("real", path.parent)] == ["", "", "plural", "none"]


@pytest.mark.parametrize("kind", ["csv", "path", "polygons"])
def test_ones_own_masks_are_read_as_in_training(tmp_path, kind):
    if kind == "csv":
        folder = own_masks.as_csv_folder(tmp_path / "mine")
    else:
        path = own_masks.as_jsonl(tmp_path / "mine", kind)
        folder = path.rename(path.with_name("all.jsonl")).parent
    samples = read("masks", folder)
    assert [sample.text for sample in samples] == [*own_masks.PROMPTS.values(), own_masks.ABSENT] * 2
    assert np.array_equal(samples[3].load_mask(), own_masks.masks()["square"]) and not samples[2].load_mask().any()
    assert samples[0].group == samples[2].group != samples[3].group
    assert samples[3].load_image().tobytes() == own_masks.photograph(1).tobytes()


@pytest.mark.parametrize("split", ["metadata", "coco"])
def test_ones_own_masks_in_other_formats(tmp_path, split):
    if split == "metadata":
        samples = read("masks", own_masks.as_metadata_folder(tmp_path / "mine"))
        assert [sample.text for sample in samples] == [own_masks.PROMPTS["disc"]] * 2
    else:
        path = own_masks.as_coco(tmp_path / "mine")
        samples = read("masks", path.rename(path.with_name("test.json")).parent)
    assert all(load_mask(sample.load_mask()).any() for sample in samples)


@pytest.mark.parametrize("kind", ["saved", "saved splits", "parquet", "parquet split"])
def test_ones_own_masks_in_tables(tmp_path, kind):
    table = Dataset.from_list(
        [{"photo": own_masks.photograph(0), "mask": Image.fromarray(mask)} for mask in own_masks.masks().values()]
    )
    folder = tmp_path / "mine"
    if kind == "saved":
        table.save_to_disk(folder)
    elif kind == "saved splits":
        DatasetDict(train=table.select([0]), test=table).save_to_disk(folder)
    else:
        path = folder / ("test" if kind == "parquet split" else "") / "all.parquet"
        path.parent.mkdir(parents=True)
        table.to_parquet(path)
    with pytest.raises(ValueError, match="no column 'image' among .*; name it by --columns"):
        read("masks", folder, options={"prompt": "the thing"})
    samples = read("masks", folder, options={"prompt": "the thing", "columns": "image=photo"})
    assert [sample.text for sample in samples] == ["the thing"] * 2
    assert np.array_equal(samples[1].load_mask(), own_masks.masks()["disc"])
    assert samples[0].load_image().tobytes() == own_masks.photograph(0).tobytes()


@pytest.mark.parametrize("name", ["train.parquet", "train-00000-of-00001.parquet", "saved"])
def test_tables_of_another_split_are_not_asked(tmp_path, name):
    row = {"image": own_masks.photograph(0), "mask": Image.fromarray(own_masks.masks()["disc"]), "prompt": "the disc"}
    table = Dataset.from_list([row])
    if name == "saved":
        DatasetDict(train=table, validation=table).save_to_disk(tmp_path)
    else:
        table.to_parquet(tmp_path / name)
    message = "has the splits train, validation, but no test" if name == "saved" else "but no test.parquet: give the"
    with pytest.raises(ValueError, match=message):
        read("masks", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "photo"}, "--columns takes image=NAME"),
        ({"coco_prompts": "names"}, "coco_prompts must be one of auto, categories, captions, not 'names'"),
        ({"absent_per_image": -1}, "absent_per_image must be a whole number from 0, not -1"),
        ({"colums": "image=photo"}, "masks has no option 'colums'; it has: prompt, columns,"),
    ],
)
def test_options_of_ones_own_masks_that_cannot_be(tmp_path, options, message):
    path = own_masks.as_coco(tmp_path / "mine")
    folder = path.rename(path.with_name("test.json")).parent
    with pytest.raises(ValueError, match=message):
        read("masks", folder, options=options)
    assert len(read("masks", folder, options={"absent_per_image": 1})) == len(read("masks", folder)) + 1


def test_ones_own_masks_by_splits(tmp_path):
    path = own_masks.as_jsonl(tmp_path / "mine")
    path = path.rename(path.with_name("test.jsonl"))
    path.with_name("train.jsonl").write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert len(read("masks", path.parent)) == 6 and len(read("masks", path.parent, split="train")) == 2
    path.unlink()
    with pytest.raises(ValueError, match="holds train.jsonl, but no test.jsonl: give the --split"):
        read("masks", path.parent)
    with pytest.raises(ValueError, match="is a conversation"):
        read("masks", own_masks.as_conversations(tmp_path / "talk").parent)


def test_pope_of_the_hub(tmp_path):
    rows = [
        {"id": str(i), "question_id": str(i), "question": f"Is there a {thing}?", "answer": answer, "category": kind,
         "image_source": "COCO_val2014_000000310196", "image": {"bytes": tiny_tasks.jpeg(i), "path": None}}
        for i, (thing, answer, kind) in enumerate([("dog", "yes", "popular"), ("cat", "no", "random")])
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    table = tiny_tasks.pa.Table.from_pylist(rows)
    tiny_tasks.pq.write_table(table, tmp_path / "data" / "test-00000-of-00001.parquet")
    samples = read("pope", tmp_path)
    assert [(s.text, s.answer, s.kind) for s in samples] == [
        ("Is there a dog?", "yes", "popular"),
        ("Is there a cat?", "no", "random"),
    ]
    assert samples[1].load_image().size == (40, 30)


def test_every_expression_of_a_photograph_is_a_sample(tmp_path):
    samples = read("real", tiny_tasks.write_photographs(tmp_path))
    told = [(sample.text, sample.kind) for sample in samples]
    assert told == [("the red thing", "noun"), ("it", "noun"), ("all of it", "plural"), ("the whale", "none")]
    assert [sample.load_image().size for sample in samples] == [(60, 40)] * 3 + [(30, 50)]
    assert all(sample.load_image().mode == "RGB" for sample in samples)
    masks = [sample.load_mask() for sample in samples]
    assert [mask.shape for mask in masks] == [(40, 60)] * 3 + [(50, 30)]
    assert [int(mask.sum()) for mask in masks] == [225, 225, 225, 0]
    assert masks[0].dtype == bool and masks[0][5:20, 10:25].all()
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(MissingData, match="real.json names masks/b.png, which is not in"):
        read("real", tmp_path)


def test_scenes_depend_on_seed_and_preset_alone(bank_folder):
    options = {"preset": "easy", "seed": 5, "expressions": 6}
    source = open_source(load_task("scenes"), bank_folder, split="unseen", options=options)
    first, second = read_samples(source), read_samples(source)
    assert len(first) == 6 and first.ids == [
        "000000-00",
        "000000-01",
        "000000-02",
        "000000-03",
        "000001-00",
        "000001-01",
    ]
    for one, other in zip(first, reversed(list(reversed(second))), strict=True):  # looked at in another order
        assert one.text == other.text and np.array_equal(one.load_mask(), other.load_mask())
    assert first[0].load_image().tobytes() != first[4].load_image().tobytes()
    assert first[0].group == first[3].group != first[4].group


def test_presets_joined_by_a_plus_take_turns(bank_folder):
    def masks(preset: str) -> list[np.ndarray]:
        options = {"preset": preset, "seed": 5, "expressions": 8}
        source = open_source(load_task("scenes"), bank_folder, split="val", options=options)
        return [sample.load_mask() for sample in read_samples(source)]

    easy, medium, both = masks("easy"), masks("medium"), masks("easy+medium")
    assert all(np.array_equal(a, b) for a, b in zip(both, easy[:4] + medium[4:], strict=True))  # four a scene
    assert not all(np.array_equal(a, b) for a, b in zip(easy, medium, strict=True))


def test_questions_are_about_the_scenes_of_the_other_task(bank_folder):
    options = {"preset": "easy", "seed": 5}
    source = open_source(load_task("scenes-vqa"), bank_folder, split="val", options={**options, "questions": 9})
    first, second = read_samples(source), read_samples(source)
    assert len(first) == 9 and first.ids == sorted(first.ids)
    for one, other in zip(first, reversed(list(reversed(second))), strict=True):  # looked at in another order
        assert (one.text, one.answer, one.accepted) == (other.text, other.answer, other.accepted)
        assert one.load_image().tobytes() == other.load_image().tobytes()
    assert all(sample.text and sample.answer for sample in first)
    assert all(bool(sample.accepted) != (sample.kind in ("box", "list")) for sample in first)
    source = open_source(load_task("scenes"), bank_folder, split="val", options={**options, "expressions": 8})
    images = {sample.group: sample.load_image().tobytes() for sample in read_samples(source)}
    assert {sample.group: sample.load_image().tobytes() for sample in first if sample.group in images} == images


def test_samples_come_in_the_order_of_their_ids():
    known = [Sample(name, name, lambda: Image.new("RGB", (2, 2))) for name in ("c", "a", "b")]
    samples = Samples.of(known)
    assert samples.ids == ["a", "b", "c"] and [sample.text for sample in samples] == ["a", "b", "c"]
    assert samples.first(2).ids == ["a", "b"] and [sample.id for sample in samples.first(2)] == ["a", "b"]
    with pytest.raises(ValueError, match="the sample id 'a' is there twice"):
        Samples.of([*known, known[1]])


def test_images_are_not_turned_by_exif(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    path = tiny_tasks.write_image(tmp_path / "turned.jpg", exif=exif)
    assert open_rgb(path).size == (40, 30) and not open_rgb(path).getexif()


@pytest.mark.parametrize("wrong", ["text", {"size": [3, 4], "counts": "x"}])
def test_segmentations_that_are_none(wrong):
    with pytest.raises(ValueError, match="must be polygons or RLE of 30x40"):
        segmentation_rle([wrong], 30, 40)


def test_segmentations_of_nothing():
    for nothing in ([], [[]], [[[1, 2, 3, 4]]]):
        assert not load_mask(segmentation_rle(nothing, 30, 40)).any()


def test_a_split_without_samples_is_told(tmp_path):
    with pytest.raises(ValueError, match="refcoco has no samples in the split 'testB'"):
        read("refcoco", tiny_tasks.write_refer(tmp_path), split="testB")


def test_broken_json_is_told_by_name(tmp_path):
    tiny_tasks.write_psalm(tmp_path)
    (tmp_path / "refcoco" / "val_psalm.json").write_text(json.dumps([])[:-1])
    with pytest.raises(ValueError, match="val_psalm.json is not JSON"):
        read("refcoco", tmp_path)
