"""Every data format gives the same rows; what the rows hold is held against masks that the test knows."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import own_masks
import pytest
from PIL import Image

from processing.mask_inputs import load_mask
from trl_recipes.mask_data import BadSample, ReaderOptions, has_split, load_mask_data, split_by_image

SQUARE, DISC = own_masks.masks()["square"], own_masks.masks()["disc"]
NOTHING = np.zeros_like(DISC)


def load(data: Path, split: str = "train", **options) -> datasets.Dataset:
    return load_mask_data(data, split, ReaderOptions(**options), progress=False)


def decoded(row: dict) -> np.ndarray:
    assert len(row["masks"]) <= 1
    return load_mask(row["masks"][0]) if row["masks"] else NOTHING


def check_six_rows(found: datasets.Dataset, prompts: bool = True) -> None:
    """In each picture the square, the disc and nothing."""
    assert len(found) == 6
    for number, row in enumerate(found):
        thing = ("square", "disc", None)[number % 3]
        np.testing.assert_array_equal(decoded(row), own_masks.masks()[thing] if thing else NOTHING)
        assert row["prompt"] == (own_masks.PROMPTS[thing] if thing else own_masks.ABSENT)
        assert row["image_size"] == [own_masks.HEIGHT, own_masks.WIDTH] and not row["conversation"]
        np.testing.assert_array_equal(row["image"], own_masks.photograph(number // 3))
    assert len(set(found["image_id"])) == 2


@pytest.mark.parametrize("kind", ["path", "rle"])
def test_jsonl(tmp_path, kind):
    path = own_masks.as_jsonl(tmp_path / "own", kind)
    found = load(path)
    check_six_rows(found)
    assert found[1]["sample"] == f"{path} line 2"


def test_jsonl_with_polygons_draws_them_as_coco_does(tmp_path):
    found = load(own_masks.as_jsonl(tmp_path / "own", "polygons"))
    np.testing.assert_array_equal(decoded(found[0]), SQUARE)
    points = [[[36, 11], [55, 11], [55, 30], [36, 30]]]
    rows = [own_masks.rows()[0] | {"mask": polygons} for polygons in (points, points[0], own_masks.SQUARE)]
    for row in load(own_masks.write_jsonl(tmp_path / "own" / "points.jsonl", rows)):
        np.testing.assert_array_equal(decoded(row), SQUARE)


def test_several_masks_for_one_prompt_are_one_answer(tmp_path):
    row = own_masks.rows()[0] | {"mask": ["masks/0_square.png", own_masks.rle(DISC)]}
    own_masks.write_pictures(tmp_path / "own")
    found = load(own_masks.write_jsonl(tmp_path / "own" / "both.jsonl", [row]))
    np.testing.assert_array_equal(decoded(found[0]), SQUARE | DISC)


def test_a_black_mask_says_that_the_thing_is_not_there(tmp_path):
    own_masks.write_pictures(tmp_path / "own")
    Image.fromarray(NOTHING).save(tmp_path / "own/masks/0_square.png")
    assert load(own_masks.write_jsonl(tmp_path / "own" / "a.jsonl", own_masks.rows()[:1]))[0]["masks"] == []


def test_paths_start_at_the_image_root_and_columns_may_have_other_names(tmp_path):
    own_masks.write_pictures(tmp_path / "own")
    renamed = [{"photo": row["image"], "query": row["prompt"], "where": row["mask"]} for row in own_masks.rows()]
    path = own_masks.write_jsonl(tmp_path / "elsewhere.jsonl", renamed)
    columns = {"image": "photo", "prompt": "query", "mask": "where"}
    check_six_rows(load(path, image_root=tmp_path / "own", columns=columns))


def test_a_list_of_rows_in_json(tmp_path):
    path = own_masks.write_pictures(tmp_path / "own") / "rows.json"
    path.write_text(json.dumps(own_masks.rows()))
    check_six_rows(load(path))


def test_folder_with_prompts_csv(tmp_path):
    folder = own_masks.as_csv_folder(tmp_path / "own")
    found = load(folder)
    check_six_rows(found)
    assert found[0]["sample"] == f"{folder / 'prompts.csv'} line 2"


@pytest.mark.parametrize("listed", [own_masks.as_csv_folder, own_masks.as_metadata_folder])
def test_prompts_of_pictures_in_another_folder(tmp_path, listed):
    folder, root = listed(tmp_path / "own"), tmp_path / "pictures"
    expected = load(folder).remove_columns("image")
    root.mkdir()
    for name in ("images", "masks"):
        (folder / name).rename(root / name)
    found = load(folder, image_root=root)
    for row, before in zip(found, expected, strict=True):
        assert [row[name] for name in ("prompt", "masks")] == [before[name] for name in ("prompt", "masks")]
        assert row["image_id"].startswith(str(root))
    with pytest.raises(ValueError, match="prompts.csv line 2|metadata.jsonl line 1"):
        load(folder)


def test_folder_with_metadata_jsonl_and_masks_called_like_the_images(tmp_path):
    found = load(own_masks.as_metadata_folder(tmp_path / "own"))
    assert found["prompt"] == [own_masks.PROMPTS["disc"]] * 2
    assert all((decoded(row) == DISC).all() for row in found)


def test_folder_of_photographs_with_masks_beside_them_and_one_prompt(tmp_path):
    own_masks.photograph(0).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(DISC).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    for folder, root in ((tmp_path, None), (tmp_path / "empty", tmp_path)):
        (row,) = load(folder, prompt="the ball", image_root=root)
        assert row["prompt"] == "the ball" and (decoded(row) == DISC).all()


def test_coco_categories_are_one_request_for_each_image(tmp_path):
    found = load(own_masks.as_coco(tmp_path / "own"))
    assert found["prompt"] == ["square", "ball", "ball"]
    small = NOTHING.copy()
    small[0:6, 50:58] = True
    for row, truth in zip(found, [SQUARE | small, DISC, DISC], strict=True):
        np.testing.assert_array_equal(decoded(row), truth)


def test_coco_asks_for_what_is_not_there_when_told_to(tmp_path):
    path = own_masks.as_coco(tmp_path / "own")
    found = load(path, absent_per_image=3)
    assert found["prompt"] == ["square", "ball", "ball", "square"]  # the second picture has no square
    assert found[3]["masks"] == [] and found[3]["image_id"] == found[2]["image_id"]
    assert load(path, absent_per_image=3)["prompt"] == found["prompt"]


def test_coco_never_says_that_something_is_absent_that_is_annotated(tmp_path):
    def absent(name: str, skip: bool = False) -> list[str]:
        path = own_masks.as_coco(tmp_path / name, content)
        found = load_mask_data(path, options=ReaderOptions(absent_per_image=9), skip_bad_samples=skip, progress=False)
        return [row["prompt"] for row in found if not row["masks"] and row["image"].size and "0.png" in row["image_id"]]

    content = own_masks.coco()
    content["annotations"][2]["segmentation"] = []
    assert absent("skipped", skip=True) == []
    content = own_masks.coco()
    for number, name in enumerate(("ball", "Ball", "ball_", "red ball", "Red_Ball ", "cat")):
        content["categories"].append({"id": 10 + number, "name": name})
    assert sorted(absent("names")) == ["cat", "red ball"]
    content["annotations"].append({"image_id": 7, "category_id": 99, "segmentation": own_masks.SQUARE})
    assert absent("unknown", skip=True) == []  # it may be any of them
    content = own_masks.coco()
    content["images"].append(content["images"][0] | {"id": 9})  # the same file once more
    assert absent("twice") == []


def test_coco_categories_of_the_same_name_are_one_request(tmp_path):
    content = own_masks.coco()
    content["categories"].append({"id": 4, "name": "Square"})
    content["annotations"][2]["category_id"] = 4
    found = load(own_masks.as_coco(tmp_path / "own", content))
    assert found["prompt"] == ["square", "ball"]
    assert (decoded(found[0]) & DISC).sum() == DISC.sum()


def test_coco_captions_are_one_request_each(tmp_path):
    content = own_masks.coco()
    content["annotations"] = content["annotations"][2:]
    content["annotations"][0]["caption"] = ["the blue ball", "a disc"]
    content["annotations"][1]["caption"] = "the ball at dusk"
    found = load(own_masks.as_coco(tmp_path / "own", content))
    assert found["prompt"] == ["the blue ball", "a disc", "the ball at dusk"]
    assert all((decoded(row) == DISC).all() for row in found)
    assert load(tmp_path / "own/annotations.json", coco_prompts="categories")["prompt"] == ["ball", "ball"]


def test_released_conversations_keep_their_wording_and_the_order_of_their_masks(tmp_path):
    found = load(own_masks.as_conversations(tmp_path / "own"))
    both, history, words, one = found
    assert [len(row["masks"]) for row in found] == [2, 2, 0, 1]
    np.testing.assert_array_equal(load_mask(both["masks"][0]), SQUARE)
    np.testing.assert_array_equal(load_mask(both["masks"][1]), DISC)
    assert both["conversation"] == [
        {"role": "user", "content": " Please segment both."},
        {"role": "assistant", "content": "results are: <mask><mask>."},
    ]
    assert history["prompt"] == "And the ball?" and len(history["conversation"]) == 4
    assert words["conversation"][-1]["content"] == "No."
    assert one["conversation"][0]["content"] == " Please segment ball in this image."


def table() -> datasets.Dataset:
    """The six rows with images and masks inside of the table."""
    rows = own_masks.rows("rle")
    values = {
        "image": [own_masks.photograph(number // 3) for number in range(6)],
        "prompt": [row["prompt"] for row in rows],
        "mask": [None if not row["mask"] else Image.fromarray(load_mask(row["mask"])) for row in rows],
    }
    features = {"image": datasets.Image(), "prompt": datasets.Value("string"), "mask": datasets.Image()}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def test_datasets_saved_to_disk(tmp_path):
    table().save_to_disk(tmp_path / "one")
    found = load(tmp_path / "one")
    check_six_rows(found)
    assert found[1]["sample"] == f"{tmp_path / 'one'} row 1"
    datasets.DatasetDict({"train": table(), "validation": table().select([1])}).save_to_disk(tmp_path / "two")
    check_six_rows(load(tmp_path / "two"))
    assert len(load(tmp_path / "two", "validation")) == 1


def test_datasets_as_parquet_with_rle_masks_and_paths(tmp_path):
    own_masks.write_pictures(tmp_path / "own")
    features = {"image": datasets.Value("string"), "prompt": datasets.Value("string")}
    features["mask"] = {"size": datasets.List(datasets.Value("int64")), "counts": datasets.Value("string")}
    rows = [row | {"mask": row["mask"] or None} for row in own_masks.rows("rle")]
    rows_table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    rows_table.to_parquet(tmp_path / "own/train.parquet")
    check_six_rows(load(tmp_path / "own", image_root=tmp_path / "own"))
    check_six_rows(load(tmp_path / "own/train.parquet", image_root=tmp_path / "own"))


def test_parquet_with_relative_paths_starts_at_its_own_folder(tmp_path):
    own_masks.write_pictures(tmp_path / "own")
    rows_table = datasets.Dataset.from_list([row | {"mask": row["mask"] or None} for row in own_masks.rows()])
    rows_table.to_parquet(tmp_path / "own/train.parquet")
    check_six_rows(load(tmp_path / "own/train.parquet"))
    check_six_rows(load(tmp_path / "own"))
    rows_table.save_to_disk(tmp_path / "own")
    check_six_rows(load(tmp_path / "own"))


def test_parquet_with_picture_files_as_bytes(tmp_path):
    own_masks.write_pictures(tmp_path)
    rows = [
        {part: (tmp_path / row[part]).read_bytes() if row[part] else None for part in ("image", "mask")}
        | {"prompt": row["prompt"]}
        for row in own_masks.rows()
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "bytes.parquet")
    check_six_rows(load(tmp_path / "bytes.parquet"))


@pytest.mark.parametrize("kind", ["array", "rows of pixels", "pictures"])
def test_parquet_with_masks_as_arrays_or_lists_of_pictures(tmp_path, kind):
    feature, value = {
        "array": (datasets.Array2D((40, 60), "bool"), DISC),
        "rows of pixels": (datasets.List(datasets.List(datasets.Value("bool"))), DISC.tolist()),
        "pictures": (datasets.List(datasets.Image()), [Image.fromarray(DISC), Image.fromarray(SQUARE)]),
    }[kind]
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string"), "mask": feature})
    values = {"image": [own_masks.photograph(0)], "prompt": ["the ball"], "mask": [value]}
    datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / "a.parquet")
    np.testing.assert_array_equal(
        decoded(load(tmp_path / "a.parquet")[0]), DISC | SQUARE if kind == "pictures" else DISC
    )


def test_jsonl_ends_lines_at_newlines_alone(tmp_path):
    row = own_masks.rows()[0] | {"prompt": "the\u2028red\u0085square"}
    path = own_masks.write_pictures(tmp_path / "own") / "a.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert load(path)["prompt"] == [row["prompt"]]


def test_masks_of_a_folder_are_found_by_their_bare_names(tmp_path):
    folder = own_masks.write_pictures(tmp_path)
    (folder / "prompts.csv").write_text("image,prompt,mask\n0.png,the ball,0_disc.png\n1,the ball,1_disc\n")
    assert all((decoded(row) == DISC).all() for row in load(folder))


def test_splits_are_folders_or_files(tmp_path):
    own_masks.as_csv_folder(tmp_path / "a/train")
    own_masks.as_metadata_folder(tmp_path / "a/val")
    assert has_split(tmp_path / "a", "validation") and not has_split(tmp_path / "a", "test")
    assert len(load(tmp_path / "a", "train")) == 6 and len(load(tmp_path / "a", "validation")) == 2
    own_masks.write_pictures(tmp_path / "b")
    for name, count in (("train", 5), ("validation", 1)):
        own_masks.write_jsonl(tmp_path / f"b/{name}.jsonl", own_masks.rows()[:count])
    assert [len(load(tmp_path / "b", name)) for name in ("train", "validation")] == [5, 1]
    assert not has_split(tmp_path / "b/train.jsonl", "validation")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_folder_with_another_split_alone_is_no_training_data(tmp_path, suffix):
    (tmp_path / f"validation{suffix}").touch()
    assert has_split(tmp_path, "validation") and not has_split(tmp_path, "train")


def test_no_image_is_on_both_sides_of_a_split(tmp_path):
    found = load(own_masks.as_jsonl(tmp_path / "own"))
    train, validation = split_by_image(found, share=0.1)
    assert len(train) == len(validation) == 3
    assert not set(train["image_id"]) & set(validation["image_id"])
    assert split_by_image(found, 0.1)[1]["sample"] == validation["sample"]
    with pytest.raises(ValueError, match="too few.*--eval_data"):
        split_by_image(train, share=0.5)


def test_an_image_that_lies_on_its_side_is_set_upright(tmp_path):
    picture = own_masks.photograph(0).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to look at it
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images/0.jpg", exif=exif, quality=95)
    row = {"image": "images/0.jpg", "prompt": "the ball", "mask": own_masks.rle(DISC)}
    (found,) = load(own_masks.write_jsonl(tmp_path / "a.jsonl", [row]))
    assert found["image_size"] == [own_masks.HEIGHT, own_masks.WIDTH]
    assert found["image"].size == (own_masks.WIDTH, own_masks.HEIGHT)


@pytest.mark.parametrize("box", [[[0, 0, 1, 0, 1, 1, 0, 1]], [[0, 0], [1, 0], [1, 1], [0, 1]]])
def test_polygons_of_few_numbers_are_no_pixels(tmp_path, box):
    own_masks.write_pictures(tmp_path)
    own_masks.write_jsonl(tmp_path / "train.jsonl", [{"image": "images/0.png", "prompt": "the corner", "mask": box}])
    (row,) = load(tmp_path / "train.jsonl")
    assert decoded(row).sum() == decoded(row)[0, 0] == 1


@pytest.mark.parametrize("white", [True, 1, 255])
def test_masks_that_are_rows_of_pixels(tmp_path, white):
    """As a table or JSON holds arrays; of other numbers they are polygons."""
    pixels = (DISC * np.asarray(white)).tolist()
    own_masks.write_pictures(tmp_path)
    own_masks.write_jsonl(tmp_path / "train.jsonl", [{"image": "images/0.png", "prompt": "the ball", "mask": pixels}])
    assert all((decoded(row) == DISC).all() for row in load(tmp_path / "train.jsonl"))
    table = datasets.Dataset.from_dict(
        {"image": [own_masks.photograph(0)], "prompt": ["the ball"], "mask": [DISC.astype(np.uint8) * np.uint8(white)]}
    )
    table.save_to_disk(tmp_path / "table")
    assert all((decoded(row) == DISC).all() for row in load(tmp_path / "table"))


def test_two_images_do_not_share_a_mask_by_their_names(tmp_path):
    folder = own_masks.write_pictures(tmp_path)
    own_masks.photograph(1).save(folder / "images/0.jpg")
    (folder / "masks/0_disc.png").rename(folder / "masks/0.png")
    (folder / "prompts.csv").write_text("image,prompt\n0.png,the ball\n0.png,the disc\n0.jpg,the ball\n")
    with pytest.raises(BadSample, match=r"masks/0.png would be the mask of images/0.png and of images/0.jpg"):
        load(folder)
    shutil.copy(folder / "masks/0.png", folder / "masks/0.jpg.png")
    assert len(load(folder)) == 3
    (folder / "prompts.csv").write_text("image,prompt\n0.png,the ball\n./images/0.png,the disc\n")
    assert len(load(folder)) == 2


def test_test_masks_may_lie_beside_what_is_for_training(tmp_path):
    folder = own_masks.as_csv_folder(tmp_path / "own")
    own_masks.write_jsonl(folder / "test.jsonl", own_masks.rows()[:2])
    assert len(load(folder, "train")) == 6 and len(load(folder, "test")) == 2
    assert not has_split(folder, "validation")


def test_a_list_goes_before_a_folder_of_the_same_name(tmp_path):
    """`train/` may hold just the images; if it has a list of its own, that counts."""
    own_masks.as_jsonl(tmp_path)
    (tmp_path / "train").mkdir()
    assert len(load(tmp_path, "train")) == 6
    own_masks.as_metadata_folder(tmp_path / "other" / "train")
    (tmp_path / "other/train.json").write_text("{}")
    assert len(load(tmp_path / "other", "train")) == 2
