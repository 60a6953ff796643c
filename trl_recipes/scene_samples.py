"""Composed scenes as training samples: one image, several requests, each answered by a mask or by words."""

from typing import Any

import torch
from torch.utils.data import Dataset

from processing import ARGenSegProcessor

from .scenes import SceneDataset

ABSENT = "There is no {thing}."


def scene_conversation(processor: ARGenSegProcessor, image: Any, expression: dict[str, Any]) -> list[dict[str, Any]]:
    """Request and answer: the mask, or for a thing that is not there words that say so, and no picture."""
    if expression["kind"] != "none":
        return processor.build_segmentation_conversation(image, expression["text"], expression["mask"])
    answer = {"type": "text", "text": ABSENT.format(thing=expression["missing"])}
    return processor.build_segmentation_conversation(image, expression["text"]) + [
        {"role": "assistant", "content": [answer]}
    ]


def question_conversation(image: Any, question: dict[str, Any]) -> list[dict[str, Any]]:
    """A question about the image and its answer in words."""
    asked = [{"type": "image", "image": image}, {"type": "text", "text": question["text"]}]
    answer = [{"type": "text", "text": question["answer"]}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


class SceneSamples(Dataset):
    """`ds[i]` -> `pixel_values` (3, H, W) of scene i, and `input_ids` and `labels`, a list with one for each request
    and question.

    Labels are -100 up to the answer. The image stands once, however many requests there are; see `SceneCollator`.
    """

    def __init__(self, scenes: SceneDataset, processor: ARGenSegProcessor) -> None:
        self.scenes, self.processor = scenes, processor

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scenes[index]
        conversations = [scene_conversation(self.processor, scene["image"], e) for e in scene["expressions"]]
        conversations += [question_conversation(scene["image"], q) for q in scene["questions"]]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": False, "return_tensors": None},
        )
        ids = [torch.tensor(row) for row in inputs["input_ids"]]
        answers = [torch.tensor(row, dtype=torch.bool) for row in inputs["assistant_masks"]]
        labels = [row.masked_fill(~answer, -100) for row, answer in zip(ids, answers, strict=True)]
        return {"pixel_values": torch.as_tensor(inputs["pixel_values"][0]), "input_ids": ids, "labels": labels}


class SceneCollator:
    """Batches scenes: streams are padded on the right, `image_index` says which image belongs to each.

    Lengths are rounded up to a multiple of 16: kernels are chosen once for each shape.
    """

    def __init__(self, pad_token_id: int, multiple_of: int = 16) -> None:
        self.pad_token_id, self.multiple_of = pad_token_id, multiple_of

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row for sample in samples for row in sample["input_ids"]]
        labels = [row for sample in samples for row in sample["labels"]]
        index = [i for i, sample in enumerate(samples) for _ in sample["input_ids"]]
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "image_index": torch.tensor(index),
            **pad_streams(ids, labels, self.pad_token_id, self.multiple_of),
        }


def pad_streams(
    ids: list[torch.Tensor], labels: list[torch.Tensor], pad_token_id: int, multiple_of: int
) -> dict[str, torch.Tensor]:
    """Rows (l,) as `input_ids`, `attention_mask` and `labels` (B, L), padded on the right to a multiple of a length."""

    def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        return torch.nn.functional.pad(padded, (0, -padded.shape[1] % multiple_of), value=value)

    return {
        "input_ids": pad(ids, pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
        "labels": pad(labels, -100),
    }
