"""What is wrong with data is said with file, line and field before anything is trained; nothing is replaced."""

import datasets
import numpy as np
import own_masks
import pytest
from PIL import Image

from trl_recipes.mask_data import BadSample, ReaderOptions, load_mask_data

GOOD = own_masks.rows()[0]
OPEN = "conversations"


def conversation(**changes):
    return own_masks.conversation_rows()[3] | changes


BAD_ROWS = {
    "no image": ({"prompt": "x", "mask": None}, "image", "no image"),
    "image null": (GOOD | {"image": None}, "image", "no image"),
    "missing image": (GOOD | {"image": "images/9.png"}, "image", "no file.*9.png"),
    "broken image": (GOOD | {"image": "images/broken.png"}, "image", "cannot read"),
    "no prompt": ({"image": "images/0.png", "mask": None}, "prompt", "--columns"),
    "blank prompt": (GOOD | {"prompt": "  "}, "prompt", "no prompt"),
    "number as prompt": (GOOD | {"prompt": 3}, "prompt", "no prompt"),
    "no mask field": ({"image": "images/0.png", "prompt": "x"}, "mask", r"null or \[\]"),
    "missing mask": (GOOD | {"mask": "masks/9.png"}, "mask", "no file.*9.png"),
    "mask of another size": (GOOD | {"mask": "masks/small.png"}, "mask", "5x4 .*image 60x40"),
    "grey mask": (GOOD | {"mask": "masks/grey.png"}, "mask", "threshold it first"),
    "RLE of another size": (GOOD | {"mask": {"size": [2, 2], "counts": [1, 3]}}, "mask", "2x2.*60x40"),
    "RLE without counts": (GOOD | {"mask": {"size": [40, 60]}}, "mask", "not a COCO RLE"),
    "two points": (GOOD | {"mask": [[1, 2, 3, 4]]}, "mask", "at least three points"),
    "odd numbers": (GOOD | {"mask": [[1, 2, 3, 4, 5, 6, 7]]}, "mask", "at least three points"),
    "text in a polygon": (GOOD | {"mask": [[1, 2, 3, 4, 5, "6"]]}, "mask", "at least three points"),
    "polygon off the image": (GOOD | {"mask": [[90, 90, 99, 90, 99, 99]]}, "mask", "x from 90 to 99.* goes to 60"),
    "polygon in another size": (GOOD | {"mask": [[9, 9, 30, 9, 30, 50]]}, "mask", "y from 9 to 50.* goes to 40"),
    "size of the annotated image": (
        GOOD | {"mask": [[9, 9, 30, 9, 30, 30]], "height": 80, "width": 120},
        "mask",
        "the row says 120x80",
    ),
    "polygon of no area": (GOOD | {"mask": [[9, 9, 9, 9, 9, 9]]}, "mask", "cover no pixel"),
    "number as mask": (GOOD | {"mask": 7}, "mask", "path, COCO RLE or polygons"),
    "not an object": (["images/0.png"], "", "not an object"),
    "too many masks": (conversation(mask=["masks/0_disc.png"] * 2), "mask", "2 masks for 1 <mask>"),
    "too few masks": (conversation(mask=[]), "mask", "0 masks for 1 <mask>"),
    "mask that is missing": (conversation(mask="masks/9.png"), "mask", "no file"),
    "empty mask that is shown": (conversation(mask="masks/empty.png"), "mask", "is empty"),
    "no answer": (conversation(conversations=[{"from": "human", "value": "a"}]), OPEN, "request .* answer"),
    "unknown role": (conversation(conversations=[{"from": "bot", "value": "a"}]), f"{OPEN}[0]", "human or gpt"),
    "answer without text": (
        conversation(conversations=[{"from": "human", "value": "a"}, {"from": "gpt"}]),
        f"{OPEN}[1]",
        "human or gpt",
    ),
    "mask in the request": (
        conversation(conversations=[{"from": "human", "value": "<mask>"}, {"from": "gpt", "value": "a"}]),
        OPEN,
        "only answers",
    ),
    "two images": (conversation(image=["images/0.png", "images/1.png"]), "image", "several images"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Good pictures, and all kinds of bad ones."""
    folder = own_masks.write_pictures(tmp_path_factory.mktemp("bad") / "own")
    whole = (folder / "images/0.png").read_bytes()
    (folder / "images/broken.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((4, 5), bool)).save(folder / "masks/small.png")
    Image.fromarray(np.zeros((40, 60), bool)).save(folder / "masks/empty.png")
    Image.linear_gradient("L").resize((60, 40)).save(folder / "masks/grey.png")
    return folder


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(pictures, name):
    row, field, message = BAD_ROWS[name]
    path = own_masks.write_jsonl(pictures / "bad.jsonl", [GOOD, row])
    with pytest.raises(BadSample, match=message) as caught:
        load_mask_data(path, progress=False)
    assert str(caught.value).startswith(f"{path} line 2" + (f", field {field!r}: " if field else ": "))
    assert (caught.value.where, caught.value.field) == (f"{path} line 2", field)


def test_a_line_that_is_no_json_is_named(pictures):
    path = pictures / "cut.jsonl"
    path.write_text('\n{"image": "images/0.png", "pro')
    with pytest.raises(BadSample, match=r"cut\.jsonl line 2: not JSON"):
        load_mask_data(path, progress=False)


def test_bad_samples_are_left_out_and_counted_when_asked_for(pictures, capsys):
    bad = [row for row, _, _ in BAD_ROWS.values()]
    rows = [GOOD, *bad, own_masks.rows()[5]]
    path = own_masks.write_jsonl(pictures / "mixed.jsonl", rows)
    found = load_mask_data(path, skip_bad_samples=True, progress=False)
    assert found["sample"] == [f"{path} line 1", f"{path} line {len(rows)}"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"skipped {len(bad)} bad samples, 2 are used:"
    assert said[1].startswith(f"  {path} line 2, field 'image': no image") and len(said) == 1 + 5 + 1
    assert said[-1] == f"  ... and {len(bad) - 5} more"


def test_data_without_a_single_good_sample_are_refused(pictures):
    path = own_masks.write_jsonl(pictures / "none.jsonl", [BAD_ROWS["no image"][0]])
    with pytest.raises(ValueError, match="no usable sample"):
        load_mask_data(path, skip_bad_samples=True, progress=False)


def coco_with(number: int, **changes):
    content = own_masks.coco()
    content["annotations"][number] |= changes
    return content


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"image_id": 99}, "image_id", "no image with the id 99"),
        ({"category_id": 2}, "category_id", "no category with the id 2"),
        ({"segmentation": []}, "segmentation", "missing or empty"),
        ({"segmentation": [[1, 2]]}, "segmentation", "at least three points"),
    ],
)
def test_a_bad_coco_annotation_is_named(tmp_path, changes, field, message):
    path = own_masks.as_coco(tmp_path / "own", coco_with(2, **changes))
    with pytest.raises(BadSample, match=message) as caught:
        load_mask_data(path, progress=False)
    assert caught.value.where == f"{path} annotations[2]" and caught.value.field == field
    assert len(load_mask_data(path, skip_bad_samples=True, progress=False)) == 2


def test_a_missing_coco_image_is_named(tmp_path):
    content = own_masks.coco()
    content["images"][1]["file_name"] = "9.png"
    path = own_masks.as_coco(tmp_path / "own", content)
    with pytest.raises(BadSample, match=r"annotations\[3\], field 'file_name': there is no file .*9\.png"):
        load_mask_data(path, progress=False)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"images": []}, {}, "COCO needs"),
        (own_masks.coco() | {"categories": []}, {}, "no 'categories'"),
        (own_masks.coco(), {"coco_prompts": "captions"}, "no annotation has a 'caption'"),
    ],
)
def test_json_that_is_no_coco_is_refused(tmp_path, content, options, message):
    path = own_masks.as_coco(tmp_path / "own", content)
    with pytest.raises(ValueError, match=message):
        load_mask_data(path, options=ReaderOptions(**options), progress=False)


def test_a_csv_line_with_an_unquoted_comma_is_named(tmp_path):
    folder = own_masks.write_pictures(tmp_path / "own")
    (folder / "prompts.csv").write_text("image,prompt,mask\nimages/0.png,the ball, on the left,masks/0_disc.png\n")
    with pytest.raises(BadSample, match=r"prompts\.csv line 2: not 3 columns.*double quotes"):
        load_mask_data(folder, progress=False)


def test_a_folder_that_says_too_little_is_refused(tmp_path):
    folder = own_masks.write_pictures(tmp_path / "own")
    with pytest.raises(ValueError, match=r"Write a prompts\.csv.*--prompt"):
        load_mask_data(folder, progress=False)
    with pytest.raises(BadSample, match=r"0\.png, field 'mask': no masks/0\.png"):
        load_mask_data(folder, options=ReaderOptions(prompt="the ball"), progress=False)
    own_masks.write_jsonl(folder / "mine.jsonl", own_masks.rows())
    with pytest.raises(ValueError, match=r"name the file.*mine\.jsonl"):
        load_mask_data(folder, progress=False)


def test_a_bad_row_of_a_table_is_named(tmp_path):
    rows = [{"image": own_masks.photograph(0), "prompt": text, "mask": own_masks.rle(own_masks.masks()["disc"])}
            for text in ("the ball", "")]  # fmt: skip
    features = {"image": datasets.Image(), "prompt": datasets.Value("string")}
    features["mask"] = {"size": datasets.List(datasets.Value("int64")), "counts": datasets.Value("string")}
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.save_to_disk(tmp_path / "table")
    with pytest.raises(BadSample, match=r"table row 1, field 'prompt': no prompt"):
        load_mask_data(tmp_path / "table", progress=False)
    found = load_mask_data(tmp_path / "table", skip_bad_samples=True, progress=False)
    assert found["prompt"] == ["the ball"] and found[0]["image"].size == (60, 40)
    table.remove_columns("mask").save_to_disk(tmp_path / "less")
    with pytest.raises(ValueError, match=r"no column 'mask'.*--columns mask="):
        load_mask_data(tmp_path / "less", progress=False)


def test_data_that_are_not_there_are_refused(tmp_path):
    for name in (tmp_path / "nothing", tmp_path / "nothing.jsonl", "./here/nor/there"):
        with pytest.raises(ValueError, match="there is no file or folder"):
            load_mask_data(name, progress=False)
    path = own_masks.as_jsonl(tmp_path / "own")
    with pytest.raises(ValueError, match="has no split 'validation'"):
        load_mask_data(path, "validation", progress=False)
    (tmp_path / "masks.xml").write_text("<masks/>")
    with pytest.raises(ValueError, match="not a folder, .jsonl"):
        load_mask_data(tmp_path / "masks.xml", progress=False)


def test_coco_polygons_of_another_image_size_are_refused(tmp_path):
    content = own_masks.coco()
    content["images"][0] |= {"width": 120, "height": 80}
    path = own_masks.as_coco(tmp_path / "own", content)
    with pytest.raises(
        BadSample, match=r"annotations\[0\].*image with the id 7 says 120x80 .*'0\.png' is 60x40.*scale the polygons"
    ):
        load_mask_data(path, progress=False)
    content["images"][0] |= {"width": 40, "height": 60}  # as stored, or swapped
    with pytest.raises(BadSample, match=r"says 40x60 .* is 60x40.*EXIF orientation.*swapped"):
        load_mask_data(own_masks.as_coco(tmp_path / "turned", content), progress=False)
    for told in ({}, {"width": None, "height": None}, {"width": 0, "height": 0}):
        content["images"][0] = {"id": 7, "file_name": "0.png"} | told
        assert len(load_mask_data(own_masks.as_coco(tmp_path / f"told-{told}", content), progress=False)) == 3


@pytest.mark.parametrize(
    ("part", "entry", "message"),
    [
        ("images", {"id": 7, "file_name": "1.png"}, r"images\[0\] \('0.png'\) and images\[2\] \('1.png'\).*same id 7"),
        ("categories", {"id": 3, "name": "cat"}, r"categories\[1\] \('ball'\) and categories\[2\] \('cat'\).*id 3"),
        ("categories", {"id": 4, "name": None}, "the category with the id 4 has no 'name'"),
    ],
)
def test_coco_entries_that_contradict_each_other_are_refused(tmp_path, part, entry, message):
    content = own_masks.coco()
    content[part].append(entry)
    with pytest.raises(ValueError, match=message):
        load_mask_data(own_masks.as_coco(tmp_path / "own", content), progress=False)


def test_the_same_coco_entry_twice_does_no_harm(tmp_path):
    content = own_masks.coco()
    content["images"] *= 2
    content["categories"] *= 2
    assert len(load_mask_data(own_masks.as_coco(tmp_path / "own", content), progress=False)) == 3


@pytest.mark.parametrize("name", ["prompts.csv", "rows.jsonl", "rows.json"])
def test_text_that_is_not_utf_8_is_named(tmp_path, name):
    folder = own_masks.write_pictures(tmp_path / "own")
    (folder / name).write_bytes("image,prompt\nimages/0.png,Möwe\n".encode("cp1252"))
    with pytest.raises(ValueError, match=rf"{name} line 2: not UTF-8 text .byte 0xf6.; save the file as UTF-8"):
        load_mask_data(folder if name == "prompts.csv" else folder / name, progress=False)


def test_places_where_a_picture_was_looked_for_are_named(tmp_path):
    folder = own_masks.write_pictures(tmp_path / "own")
    (folder / "prompts.csv").write_text("image,prompt,mask\n0.png,the ball,lost.png\n")
    with pytest.raises(BadSample, match=r"line 2, field 'mask': there is no file 'lost\.png' in .*own or .*own/masks"):
        load_mask_data(folder, progress=False)
