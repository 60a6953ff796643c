"""Rows of `load_mask_data` as conversations, as token ids (made once and cached), and as batches."""

import hashlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from PIL import Image
from transformers import ProcessorMixin

from modeling_argenseg import code_search
from processing.image_inputs import load_image

from ..scene_samples import ABSENT, pad_streams
from .loading import report_skipped
from .samples import MASK_MARKER, BadSample

IGNORED = -100
ROW = ("prompt", "masks", "conversation", "image_size")  # what ids depend on
TOKENS = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "problem": Value("string")})
BATCH = 16  # requests that are tokenised together


def conversation_of(processor: Any, row: dict[str, Any], image: Any = None) -> list[dict[str, Any]]:
    """Request and answer of a row, as `apply_chat_template` takes them; the last turn is the answer to learn.

    Args:
        image: in place of the row's own.
    """
    image = row["image"] if image is None else image
    if row["conversation"]:
        masks = iter(row["masks"])
        turns = [_turn(turn, masks) for turn in row["conversation"]]
        first = next(turn for turn in turns if turn["role"] == "user")
        first["content"].insert(0, {"type": "image", "image": image})
        return turns
    if row["masks"]:
        return processor.build_segmentation_conversation(image, row["prompt"], row["masks"][0])
    thing = re.sub(r"^(the|an?) ", "", row["prompt"])
    said = {"role": "assistant", "content": [{"type": "text", "text": ABSENT.format(thing=thing)}]}
    return [*processor.build_segmentation_conversation(image, row["prompt"]), said]


def _turn(turn: dict[str, str], masks: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for number, text in enumerate(turn["content"].split(MASK_MARKER)):
        content += [{"type": "mask", "mask": next(masks)}] if number else []
        content += [{"type": "text", "text": text}] if text else []
    return {"role": turn["role"], "content": content}


def target_masks(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The masks (RLE) of the last answer: what is to be drawn."""
    if not row["conversation"]:
        return row["masks"]
    count = row["conversation"][-1]["content"].count(MASK_MARKER)
    return row["masks"][len(row["masks"]) - count :]


def tokenise_masks(
    dataset: Dataset,
    processor: ProcessorMixin,
    cache_dir: str | Path | None = None,
    skip_bad_samples: bool = False,
) -> Dataset:
    """Adds `input_ids` and `labels` (-100 but for answers) to rows of `load_mask_data`.

    Each mask goes through the visual tokenizer once. The result is kept in `cache_dir` under a fingerprint of the rows,
    the visual tokenizer's weights, the geometry of masks and everything else that ids depend on.

    Args:
        processor: an `ARGenSegProcessor` with its visual tokenizer.
        cache_dir: default: `argenseg` in the cache folder of `datasets`.
        skip_bad_samples: leave out rows that cannot be tokenised (longer than the context, markers in a prompt).

    Raises:
        BadSample: a row cannot be tokenised; names file and line.
    """
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "argenseg")
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = fingerprint_of(dataset, processor)
    tokens = dataset.remove_columns("image").map(
        lambda rows: _tokenise_rows(processor, rows),
        batched=True,
        batch_size=BATCH,
        remove_columns=[name for name in dataset.column_names if name != "image"],
        features=TOKENS,
        cache_file_name=str(folder / f"masks-{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc="tokenising masks",
    )
    bad = [
        BadSample(dataset[i]["sample"], "", problem)
        for i, problem in enumerate(tokens["problem"])
        if problem is not None
    ]
    if bad and not skip_bad_samples:
        raise bad[0]
    joined = concatenate_datasets([dataset, tokens.remove_columns("problem")], axis=1)
    if bad:
        joined = joined.select([i for i, problem in enumerate(tokens["problem"]) if problem is None])
        report_skipped(bad, len(joined))
    return joined


def check_requests(dataset: Dataset, processor: ProcessorMixin, skip_bad_samples: bool = False) -> Dataset:
    """Rows of `load_mask_data` whose requests can be asked: that they fit the context and hold no markers of their own
    would be found out only when the model is asked.

    Raises:
        BadSample: one of them cannot; names file and line.
    """
    bad: dict[int, BadSample] = {}
    for number, row in enumerate(dataset.remove_columns("image")):
        blank = Image.new("RGB", tuple(row["image_size"][::-1]))
        options = {"add_generation_prompt": True, "processor_kwargs": {"search_steps": 0}}
        try:
            asked = conversation_of(processor, row, blank)[:-1]
            processor.apply_chat_template(asked, tokenize=True, return_dict=True, **options)
        except (ValueError, TypeError) as error:
            bad[number] = BadSample(row["sample"], "", str(error))
    if bad and not skip_bad_samples:
        raise next(iter(bad.values()))
    good = [number for number in range(len(dataset)) if number not in bad]
    report_skipped(list(bad.values()), len(good))
    return dataset.select(good) if bad else dataset


def _tokenise_rows(processor: Any, rows: dict[str, list]) -> dict[str, list]:
    singles = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    try:
        return _tokenise(processor, singles)
    except (ValueError, TypeError):  # one of them: look for it
        found = [_tokenise_one(processor, row) for row in singles]
        return {name: [one[name][0] for one in found] for name in TOKENS}


def _tokenise_one(processor: Any, row: dict[str, Any]) -> dict[str, list]:
    try:
        return _tokenise(processor, [row])
    except (ValueError, TypeError) as error:
        return {"input_ids": [[]], "labels": [[]], "problem": [str(error)]}


def _tokenise(processor: Any, rows: list[dict[str, Any]]) -> dict[str, list]:
    # only the size of the image matters for the ids
    blank = [Image.new("RGB", (row["image_size"][1], row["image_size"][0])) for row in rows]
    inputs = processor.apply_chat_template(
        [conversation_of(processor, row, image) for row, image in zip(rows, blank, strict=True)],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": False, "return_tensors": None},
    )
    labels = [
        [token if spoken else IGNORED for token, spoken in zip(ids, answer, strict=True)]
        for ids, answer in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    return {"input_ids": inputs["input_ids"], "labels": labels, "problem": [None] * len(rows)}


def fingerprint_of(dataset: Dataset, processor: Any) -> str:
    """Changes with all that ids depend on: the rows, the codes and how they are searched, the geometry, the text
    tokenizer, the wording."""
    digest = hashlib.sha256()
    _add_rows(digest, dataset, ROW)
    visual_tokenizer = processor._require_visual_tokenizer()
    for name, tensor in visual_tokenizer.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    parts = [
        visual_tokenizer.config.to_json_string(use_diff=False),
        inspect.getsource(code_search),
        processor.tokenizer.backend_tokenizer.to_str(),
        processor.chat_template,
        repr(sorted((name, value) for name, value in processor.to_dict().items() if name != "chat_template")),
        ABSENT,
    ]
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:32]


def content_hash(dataset: Dataset) -> str:
    """Changes with what rows teach: images, prompts, masks and their tokens, wherever the files lie."""
    digest, images = hashlib.sha256(), dataset.cast_column("image", datasets.Image(decode=False))
    _add_rows(digest, dataset, [*ROW, *(name for name in ("input_ids",) if name in dataset.column_names)])
    known: dict[str, bytes] = {}
    for name, image in zip(dataset["image_id"], images["image"], strict=True):
        if name not in known:
            known[name] = hashlib.sha256(image["bytes"] or Path(image["path"]).read_bytes()).digest()
        digest.update(known[name])
    return digest.hexdigest()[:16]


def _add_rows(digest: Any, dataset: Dataset, names: Sequence[str]) -> None:
    for row in dataset.select_columns(list(names)):
        digest.update(repr([row[name] for name in names]).encode())


class MaskCollator:
    """Batches rows of `tokenise_masks` for the model's `forward`: opens images, pads streams on the right.

    Lengths are rounded up to a multiple of `multiple_of`, so that kernels are chosen for few shapes. With
    `Trainer`, set `remove_unused_columns=False`.
    """

    def __init__(self, processor: Any, multiple_of: int = 16) -> None:
        self.processor, self.multiple_of = processor, multiple_of

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values` (images, 3, H, W), `input_ids`, `attention_mask` and `labels` (B, L)."""
        images = [load_image(row["image"]) for row in rows]
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        return {
            "pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"],
            **pad_streams(ids, labels, self.processor.tokenizer.pad_token_id, self.multiple_of),
        }
