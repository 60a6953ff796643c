"""The loop over a task's samples: batches that do not depend on how many processes share them, answered and stored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..metrics import to_rle
from ..metrics.masks import count_overlap, iou_of
from ..tasks import Sample, Samples, Task
from .answers import answer, union
from .store import PredictionStore

Predictor = Callable[[Sequence[Sample]], list[dict[str, Any]]]


@dataclass
class ModelPredictor:
    """Asks a model. Calling it with samples gives predictions as they are stored, but with masks as bool arrays.

    Attributes:
        prompt: with `{text}` (the sample's) or `{request}` (the model's own wording of a request for it).
        prompts_of_kinds: kind -> prompt, where samples of a kind have their own.
        options: of `answer`: whether to `zoom` or to `follow_edges`, and those of `generate`.
    """

    model: Any
    processor: Any
    prompt: str
    prompts_of_kinds: dict[str, str]
    options: dict[str, Any]

    @classmethod
    def for_task(cls, model: Any, processor: Any, task: Task, protocol: str, **options: Any) -> "ModelPredictor":
        return cls(model.eval(), processor, task.prompts[protocol], task.prompts_of_kinds, options)

    def __call__(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        images = [load_image(sample) for sample in samples]
        conversations = [self.conversation(*pair) for pair in zip(samples, images, strict=True)]
        labels = [sample.text for sample in samples]
        try:
            answers = answer(self.model, self.processor, conversations, images, labels, do_sample=False, **self.options)
        except ValueError as error:
            if len(samples) > 1:  # which of them?
                return [prediction for sample in samples for prediction in self([sample])]
            raise ValueError(f"sample {samples[0].id} ({samples[0].text[:80]!r}): {error}") from error
        return [_prediction(sample, found) for sample, found in zip(samples, answers, strict=True)]

    def conversation(self, sample: Sample, image: Any) -> list[dict[str, Any]]:
        """A user's turn: the image, the picture that belongs to the question if there is one, and the words."""
        pictures = [image] if sample.load_prompt is None else [image, sample.load_prompt()]
        template = self.prompts_of_kinds.get(sample.kind, self.prompt)
        if "{request}" in template:
            request = self.processor.segmentation_prompt.replace("{prompt}", sample.text.strip())
            words = template.replace("{request}", request)
        else:
            words = template.replace("{text}", sample.text)
        content = [*({"type": "image", "image": one} for one in pictures), {"type": "text", "text": words}]
        return [{"role": "user", "content": content}]


def load_image(sample: Sample) -> Any:
    """The sample's image. Raises ValueError with the sample's id if it cannot be read."""
    try:
        return sample.load_image()
    except ValueError as error:
        raise ValueError(f"sample {sample.id}: {error}") from error


def _prediction(sample: Sample, found: dict[str, Any]) -> dict[str, Any]:
    scores = [segment["score"] for segment in found["segments"] if segment["score"] is not None]
    score = float(np.mean(scores)) if scores else None
    return {"id": sample.id, "text": found["text"], "mask": union(found), "score": score}


@dataclass
class Running:
    """gIoU and cIoU so far, for the progress bar."""

    count: int = 0
    ious: float = 0.0
    intersection: int = 0
    union: int = 0

    def add(self, mask: dict[str, Any] | None, sample: Sample) -> None:
        if sample.load_mask is None:
            return
        overlap = count_overlap(mask, sample.load_mask(), sample.load_ignore() if sample.load_ignore else None)
        self.count += 1
        self.ious += overlap.iou
        self.intersection += overlap.intersection
        self.union += overlap.union

    def told(self) -> dict[str, str]:
        if not self.count:
            return {}
        return {"gIoU": f"{self.ious / self.count:.3f}", "cIoU": f"{iou_of(self.intersection, self.union):.3f}"}


def batches(count: int, size: int) -> Iterator[range]:
    """Places of samples that are answered together. They depend on the samples alone, never on who answers: padding
    and the shapes of kernels can change the last bits of a batch's numbers, and so, rarely, a mask."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def predict(
    predictor: Predictor,
    samples: Samples,
    store: PredictionStore,
    batch_size: int,
    rank: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> int:
    """Answers what the store, as it was read, lacks: process `rank` of `processes` takes every n-th open batch.

    A batch that was stored in part is answered as a whole once more, in the same company, and what was missing is
    added. Returns the number of new predictions. Call `store.open_for(rank)` before.
    """
    opened = [batch for batch in batches(len(samples), batch_size) if any(samples.ids[i] not in store for i in batch)]
    mine, running, new = opened[rank::processes], Running(), 0
    others = f", process 1 of {processes}" if processes > 1 else ""
    with tqdm(total=sum(map(len, mine)), desc=f"answering{others}", unit="sample", disable=not progress) as bar:
        for batch in mine:
            chosen = [samples[i] for i in batch]
            found = predictor(chosen)
            for prediction, sample in zip(found, chosen, strict=True):
                prediction["mask"] = None if prediction["mask"] is None else to_rle(prediction["mask"])
                running.add(prediction["mask"], sample)
            missing = [one for one in found if one["id"] not in store]
            store.append(missing)
            new += len(missing)
            bar.update(len(batch))
            bar.set_postfix(running.told(), refresh=False)
    return new
