"""Data sets of a few tiny images, in exactly the files and formats that their authors publish."""

import json
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 30, 40
SPLITS = ("train", "val", "testA", "testB")
SQUARE = [[5, 5, 15, 5, 15, 15, 5, 15]]  # COCO polygon: x 5..14, y 5..14
TWO_PARTS = [[20, 5, 24, 5, 24, 9, 20, 9], [30, 20, 34, 20, 34, 24, 30, 24]]


def square() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:15, 5:15] = True
    return mask


def two_parts() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:9, 20:24] = mask[20:24, 30:34] = True
    return mask


def rows() -> np.ndarray:
    """What the uncompressed RLE of the third annotation holds: the upper three rows."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:3] = True
    return mask


def rle(mask: np.ndarray) -> dict[str, Any]:
    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode()}


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def coco_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def annotations() -> list[dict[str, Any]]:
    """Of image 581857: a polygon, two polygons, an uncompressed RLE; of image 98304 a compressed one."""
    columns = [length for _ in range(WIDTH) for length in (3, HEIGHT - 3)]
    shared = {"iscrowd": 0, "category_id": 1}
    return [
        {"id": 11, "image_id": 581857, "segmentation": SQUARE, "bbox": [5, 5, 10, 10], "area": 100.0, **shared},
        {"id": 12, "image_id": 581857, "segmentation": TWO_PARTS, "bbox": [20, 5, 14, 19], "area": 5000.0, **shared},
        {
            "id": 13, "image_id": 581857, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, *columns]},
            "bbox": [0, 0, 40, 3], "area": 10000.0, **shared,
        },
        {"id": 14, "image_id": 98304, "segmentation": rle(square()), "bbox": [5, 5, 10, 10], "area": 100.0, **shared},
    ]  # fmt: skip


def images() -> list[dict[str, Any]]:
    found = [{"id": number, "file_name": coco_name(number)} for number in (581857, 98304, 7)]
    return [{**image, "height": HEIGHT, "width": WIDTH} for image in found]


def sentence(number: int, text: str) -> dict[str, Any]:
    return {"tokens": text.split(), "raw": text.upper(), "sent_id": number, "sent": text}


def refs() -> list[dict[str, Any]]:
    """Three references in val (two sentences, one, two), one each in train and testA."""
    told = [
        (2, 12, 581857, "val", ["the two parts"]),
        (0, 11, 581857, "val", ["the square", "left box"]),
        (5, 13, 581857, "val", ["upper edge", "the sky"]),
        (7, 14, 98304, "train", ["a square in another image"]),
        (9, 14, 98304, "testA", ["a square"]),
    ]
    return [
        {
            "ref_id": ref, "ann_id": ann, "image_id": image, "split": split, "category_id": 1,
            "file_name": coco_name(image).replace(".jpg", f"_{ref}.jpg"), "sent_ids": list(range(len(texts))),
            "sentences": [sentence(i, text) for i, text in enumerate(texts)],
        }
        for ref, ann, image, split, texts in told
    ]  # fmt: skip


def write_refer(root: Path, folder: str = "refcoco", name: str = "refs(unc).p") -> Path:
    """`refer`'s files, the pickle in the protocol of Python 2."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / name).write_bytes(pickle.dumps(refs(), protocol=2))
    write_instances(root / folder)
    return root


def write_instances(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"images": images(), "annotations": annotations(), "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    for image in images():
        write_image(folder.parent / "train2014" / image["file_name"], seed=image["id"])


def write_psalm(root: Path, folder: str = "refcoco", split: str = "val") -> Path:
    known = {one["id"]: one for one in annotations()}
    infos = {one["id"]: one for one in images()}
    rows = [
        {
            "image": infos[ref["image_id"]]["file_name"], "image_info": infos[ref["image_id"]],
            "instruction": ref["sentences"], "anns": [known[ref["ann_id"]]], "new_img_id": number,
        }
        for number, ref in enumerate(ref for ref in refs() if ref["split"] == split)
    ]  # fmt: skip
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / f"{split}_psalm.json").write_text(json.dumps(rows))
    for image in images():
        write_image(root / "train2014" / image["file_name"], seed=image["id"])
    return root


def jpeg(seed: int = 0) -> bytes:
    buffer = BytesIO()
    pixels = np.random.default_rng(seed).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_lmms(root: Path, folder: str = "refcoco") -> Path:
    """As lmms-lab/RefCOCO: images inside, one polygon an object, in two files and several row groups."""
    rows = [
        {
            "question_id": str(i), "image": {"bytes": jpeg(i), "path": None}, "question": "Describe the region.",
            "answer": answer, "segmentation": [float(x) for x in polygon], "bbox": box, "iscrowd": 0,
            "file_name": f"COCO_train2014_{image:012d}_{i}.jpg",
        }
        for i, (answer, polygon, box, image) in enumerate([
            (["the square", "left box"], SQUARE[0], [5.0, 5, 10, 10], 581857),
            (["upper part"], TWO_PARTS[0], [20.0, 5, 4, 4], 581857),
            (["lower part"], TWO_PARTS[1], [30.0, 20, 4, 4], 98304),
        ])
    ]  # fmt: skip
    (root / folder / "data").mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((rows[:2], rows[2:])):
        path = root / folder / "data" / f"val-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part), path, row_group_size=1)
    return root


def write_jxu(root: Path, folder: str = "refcoco") -> Path:
    """As jxu124/refcoco: annotations as JSON in columns, images elsewhere, val is called validation."""
    known, infos = {one["id"]: one for one in annotations()}, {one["id"]: one for one in images()}
    rows = [
        {
            **{name: ref[name] for name in ("sent_ids", "file_name", "ann_id", "ref_id", "image_id", "split")},
            "sentences": ref["sentences"], "raw_anns": json.dumps(known[ref["ann_id"]]),
            "raw_image_info": json.dumps(infos[ref["image_id"]]), "raw_sentences": json.dumps(ref["sentences"]),
            "image_path": f"coco/train2014/{infos[ref['image_id']]['file_name']}", "bbox": [0.0, 0, 1, 1],
        }
        for ref in refs() if ref["split"] == "val"
    ]  # fmt: skip
    (root / folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / folder / "data" / "validation-00000-of-00001-abc.parquet")
    for image in images():
        write_image(root / "coco" / "train2014" / image["file_name"], seed=image["id"])
    return root


def write_grefcoco(root: Path) -> Path:
    """gRefCOCO: several targets, one, and none (`ann_id` [-1], `no_target`)."""
    told = [
        (0, [11, 12], "val", ["all parts", "every thing"]),
        (1, [13], "val", ["the sky"]),
        (2, [-1], "val", ["the whale"]),
        (3, [11], "train", ["the square"]),
    ]
    found = [
        {
            "ref_id": ref, "ann_id": anns, "image_id": 581857, "split": split, "file_name": coco_name(581857),
            "category_id": [-1 if ann == -1 else 1 for ann in anns], "no_target": anns == [-1],
            "sent_ids": list(range(len(texts))), "sentences": [sentence(i, text) for i, text in enumerate(texts)],
        }
        for ref, anns, split, texts in told
    ]  # fmt: skip
    write_instances(root / "grefcoco")
    (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(found))
    return root


def write_reasonseg(root: Path) -> Path:
    """Two files of LISA's: overlapping targets with an ignored part and a flag, and one in Windows' Latin 1."""
    folder = root / "ReasonSeg" / "val"

    def shape(label: str, x0: int, y0: int, x1: int, y1: int) -> dict[str, Any]:
        points = [[x0, y0], [x1 + 0.9, y0], [x1 + 0.9, y1 + 0.9], [x0, y1]]
        return {"label": label, "points": points, "shape_type": "polygon"}

    shapes = [
        shape("ignore", 8, 8, 11, 11),
        shape("target", 5, 5, 14, 14),
        shape("target", 12, 5, 20, 9),
        shape("Flag", 0, 0, 39, 29),
    ]
    write_image(folder / "b.jpg")
    text = ["where could one sit?", "a chair"]
    (folder / "b.json").write_text(json.dumps({"text": text, "is_sentence": True, "shapes": shapes}))
    write_image(folder / "a.jpg")
    content = {"text": ["the caf\u00e9"], "is_sentence": False, "shapes": shapes[1:2]}
    (folder / "a.json").write_bytes(json.dumps(content, ensure_ascii=False).encode("cp1252"))
    return root


def write_interactive(root: Path) -> Path:
    """PSALM's JSON: an instance with all prompts, a crowd, and one without a prompt."""
    point, empty = np.zeros((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), bool)
    point[10, 12] = True
    prompts = {f"{kind}_visual_prompt_mask": rle(point) for kind in ("point", "scribble", "mask")}
    prompts["box_visual_prompt_mask"] = rle(square())
    nothing = {f"{kind}_visual_prompt_mask": rle(empty) for kind in ("point", "scribble", "mask", "box")}
    first, second, third = (dict(one) for one in annotations()[:3])
    anns = [{**first, **prompts}, {**second, **prompts, "iscrowd": 1}, {**third, **nothing}]
    info = {"id": 5, "file_name": "000000000005.jpg", "height": HEIGHT, "width": WIDTH}
    item = {"image": info["file_name"], "image_info": info, "new_img_id": 0, "anns": anns}
    (root / "coco_interactive_val_psalm.json").write_text(json.dumps([item]))
    write_image(root / "val2017" / info["file_name"])
    return root


def write_voc(root: Path) -> Path:
    """PAS-20 as fc-clip prepares it: classes from 0, 255 for background and borders."""
    for number, name in enumerate(("2007_000033", "2007_000042")):
        write_image(root / "pascal_voc_d2" / "images" / "validation" / f"{name}.jpg", seed=number)
        labels = np.full((HEIGHT, WIDTH), 255, np.uint8)
        labels[5:15, 5:15] = number
        labels[20:25, 5:15] = 19
        path = root / "pascal_voc_d2" / "annotations_pascal20" / "validation" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(path)
    return root


def write_ade(root: Path) -> Path:
    base = root / "ADEChallengeData2016"
    write_image(base / "images" / "validation" / "ADE_val_00000001.jpg")
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[5:15, 5:15], labels[20:25, 5:15] = 1, 150
    path = base / "annotations" / "validation" / "ADE_val_00000001.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(labels).save(path)
    head = "Idx\tRatio\tTrain\tVal\tStuff\tName"
    lines = [f"{i}\t0.1\t100\t10\t1\tthing {i}, other name of {i}" for i in range(1, 151)]
    (base / "objectInfo150.txt").write_text("\n".join([head, *lines]) + "\n")
    return root


def write_context_459(root: Path) -> Path:
    base = root / "pascal_ctx_d2"
    write_image(base / "images" / "validation" / "2008_000002.jpg")
    labels = np.full((HEIGHT, WIDTH), 65535, np.uint16)
    labels[5:15, 5:15], labels[20:25, 5:15] = 0, 458
    path = base / "annotations_ctx459" / "validation" / "2008_000002.tif"
    path.parent.mkdir(parents=True)
    Image.fromarray(labels).save(path)
    (root / "labels.txt").write_text("\n".join(f"{i}: thing{i}" for i in range(1, 460)) + "\n")
    return root


def write_stuff(root: Path) -> Path:
    write_image(root / "val2017" / "000000000139.jpg")
    labels = np.full((HEIGHT, WIDTH), 255, np.uint8)
    labels[5:15, 5:15], labels[20:25, 5:15] = 0, 181
    path = root / "stuffthingmaps_trainval2017" / "val2017" / "000000000139.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(labels).save(path)
    lines = ["0: unlabeled", *(f"{i}: thing {i}" for i in range(1, 183))]
    (root / "labels.txt").write_text("\n".join(lines) + "\n")
    return root


def write_mvtec(root: Path) -> Path:
    test, truth = root / "metal_nut" / "test", root / "metal_nut" / "ground_truth"
    write_image(test / "good" / "000.png")
    write_image(test / "scratch" / "000.png")
    (truth / "scratch").mkdir(parents=True)
    Image.fromarray(square().astype(np.uint8) * 255).save(truth / "scratch" / "000_mask.png")
    return root


def write_pope(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    for number, kind in enumerate(("random", "popular", "adversarial")):
        rows = [
            {"question_id": i, "image": "COCO_val2014_000000310196.jpg", "text": f"Is there a {thing} in the image?",
             "label": label}
            for i, (thing, label) in enumerate([("snowboard", "yes"), (f"car {number}", "no")], 1)
        ]  # fmt: skip
        (root / f"coco_pope_{kind}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_image(root / "val2014" / "COCO_val2014_000000310196.jpg")
    return root


def write_photographs(root: Path) -> Path:
    """Two photographs, one of them grey, and three masks; `real.json` as it is published."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (60, 40), (200, 30, 30)).save(root / "images" / "red.jpg")
    Image.new("L", (30, 50), 90).save(root / "images" / "grey.png")
    items = []
    for name, image, size, kind, texts in (
        ("a", "red.jpg", (40, 60), "noun", ["the red thing", "it"]),
        ("b", "red.jpg", (40, 60), "plural", ["all of it"]),
        ("c", "grey.png", (50, 30), "none", ["the whale"]),
    ):
        mask = np.zeros(size, np.uint8)
        mask[5:20, 10:25] = 0 if kind == "none" else 255
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        items.append(
            {"image": f"images/{image}", "mask": f"masks/{name}.png", "expressions": texts, "kind": kind, "tier": "A"}
        )
    (root / "real.json").write_text(json.dumps({"items": items}))
    return root
