"""Composed scenes as training samples: one image, several requests, each answered by a mask or by words.

Masks travel as bits and become visual tokens in batches, where the model is (`PictureEncoder`): a data loader's workers
only compose. The streams are those of the processor, picture by picture and word by word.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import BatchFeature

from processing import ARGenSegProcessor

from .masks import resize_like_pillow
from .scenes import Scene, SceneDataset
from .scenes.view import Expression
from .word_regions import WordList

ABSENT = "There is no {thing}."
MISSED = 0.7  # of the slips; the rest are tokens of another picture
WHOLE = 0.6  # of the pictures with tokens of others; in the rest tokens slip one by one
PROMPT, ANSWER = "\x02prompt\x02", "\x02answer\x02"


def scene_turns(processor: ARGenSegProcessor, expression: Expression) -> tuple[str, str]:
    """Request and answer; the answer holds the processor's mask marker, or says that the thing is not there."""
    prompt = processor.segmentation_prompt.format(prompt=expression.text)
    if expression.kind == "none":
        return prompt, ABSENT.format(thing=expression.missing)
    return prompt, processor.segmentation_answer.format(mask=processor.mask_marker)


class StreamWriter:
    """Streams of one image, one request and one answer, with code 0 in place of every visual token.

    They are what the processor makes of the same conversation, but for the codes; the processor's own way would make
    text of 341 tokens, and tokens of that text again, for each mask.
    """

    def __init__(self, processor: ARGenSegProcessor) -> None:
        self.processor = processor
        user = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        asked: list[dict[str, Any]] = [{"role": "user", "content": user}]
        answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
        before = processor.apply_chat_template(asked, add_generation_prompt=True)
        whole = processor.apply_chat_template(answered)
        image_head, image_tail = before.split(processor.image_token)
        self.tail, self.middle = image_tail.split(PROMPT)
        self.end = whole[len(before) :].split(ANSWER)[1]
        self.head = self._ids([image_head])[0] + [processor.image_token_id] * processor.image_seq_length
        self.picture = [processor.gen_start_token_id]
        self.picture += [processor.visual_token_offset] * (processor.num_visual_tokens or 0)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def __call__(self, turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """(request, answer) pairs to `{"input_ids", "labels", "draws"}`; labels are -100 up to the answer."""
        texts = []
        for prompt, answer in turns:
            before, _, after = answer.partition(self.processor.mask_marker)
            texts += [self.tail + prompt + self.middle, before, after + self.end]
        ids, rows = self._ids(texts), []
        eos = self.processor.tokenizer.eos_token_id
        for index, (_, answer) in enumerate(turns):
            prompt_ids, before_ids, after_ids = ids[3 * index : 3 * index + 3]
            draws = self.processor.mask_marker in answer
            asked = self.head + prompt_ids
            answered = before_ids + (self.picture if draws else []) + after_ids
            learned = len(answered) - answered[::-1].index(eos)  # what follows the end of the turn is the template's
            labels = [-100] * len(asked) + answered[:learned] + [-100] * (len(answered) - learned)
            rows.append({"input_ids": asked + answered, "labels": labels, "draws": draws})
        return rows


class SceneSamples(Dataset):
    """`ds[i]` -> scene i: `image` (3, H, W) uint8, `masks` (M, H, W / 8) uint8 bits, `rows`, one for each request and
    question (see `StreamWriter`), those that draw first, in the order of the masks, and `words` for each cell.

    The image stands once, however many requests there are; see `SceneCollator`.
    """

    def __init__(self, scenes: SceneDataset, processor: ARGenSegProcessor, words: WordList | None = None) -> None:
        self.scenes, self.processor, self.words = scenes, processor, words
        self.writer = StreamWriter(processor)
        size = processor.image_processor.size
        self.image_size = (size["width"], size["height"])

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, expressions = self.scenes.scene(index)
        masks = [scene.mask(one.object_ids) for one in expressions if one.kind != "none"]
        turns = [scene_turns(self.processor, one) for one in expressions]
        turns += [(one.text, one.answer) for one in self.scenes.questions(index, scene)]
        rows = sorted(self.writer(turns), key=lambda row: not row["draws"])  # stable
        sample = {"image": self.picture(scene), "rows": rows}
        if masks:
            sample["masks"] = np.packbits(np.stack(masks), axis=-1)
        if self.words is not None:
            sample["words"] = self.words.of_cells(scene)
        return sample

    def picture(self, scene: Scene) -> np.ndarray:
        """The image (3, H, W), uint8, of the size that the model takes."""
        image = scene.image
        if image.size != self.image_size:
            image = image.resize(self.image_size, Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)


class SceneCollator:
    """Batches scenes: `pixel_values` (S, 3, H, W) uint8, the streams that draw, `masks` (B, H, W / 8), one for each of
    them, and under `words` the streams that do not, which are shorter. `image_index` says which image a stream has.

    Streams are padded on the right, their lengths rounded up to `multiple_of`, their number to `rows_multiple` by
    repeating the first without labels: kernels are chosen, or compiled, once for each shape. `shared_length`, if not
    zero, is passed on to `DrawingTrainer`. `PictureEncoder` makes model inputs of it.
    """

    def __init__(
        self, pad_token_id: int, multiple_of: int = 16, rows_multiple: int = 1, shared_length: int = 0
    ) -> None:
        self.pad_token_id, self.multiple_of, self.rows_multiple = pad_token_id, multiple_of, rows_multiple
        self.shared_length = shared_length

    def streams(self, samples: list[dict[str, Any]], draws: bool) -> dict[str, torch.Tensor] | None:
        found = [(i, row) for i, sample in enumerate(samples) for row in sample["rows"] if row["draws"] == draws]
        if not found:
            return None
        index = self.filled_up(torch.tensor([i for i, _ in found]))
        # by way of NumPy, which reads lists four times as fast
        ids, labels = ([torch.from_numpy(np.array(row[name])) for _, row in found] for name in ("input_ids", "labels"))
        streams = pad_streams(ids, labels, self.pad_token_id, self.multiple_of)
        streams = {name: self.filled_up(rows) for name, rows in streams.items()}
        streams["labels"][len(found) :] = -100
        return {"image_index": index, **streams}

    def filled_up(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows, and the first of them again up to a whole multiple."""
        wanted = -(-len(rows) // self.rows_multiple) * self.rows_multiple
        return rows[torch.arange(wanted) % len(rows)]

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"pixel_values": torch.from_numpy(np.stack([sample["image"] for sample in samples]))}
        if self.shared_length:
            batch["shared_length"] = self.shared_length
        drawing, talking = self.streams(samples, draws=True), self.streams(samples, draws=False)
        if drawing is not None:
            masks = np.concatenate([sample["masks"] for sample in samples if "masks" in sample])
            batch |= drawing | {"masks": self.filled_up(torch.from_numpy(masks))}
            if talking is not None:
                batch["words"] = talking
        elif talking is not None:
            batch |= talking
        if "words" in samples[0]:
            for name in samples[0]["words"]:
                stacked = np.stack([sample["words"][name] for sample in samples])
                batch[f"cell_{name}"] = torch.from_numpy(stacked)
        return batch


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


class PictureEncoder(nn.Module):
    """What the processor does to images and masks, for whole batches on the device of the model. Pictures of masks are
    the same to the last bit; a token may differ where two codes are as good and a batch is summed in another order.

    Args:
        processor: whose geometry and visual tokenizer are used.
        slips: share of the pictures that get wrong tokens in their first scales, as a model's own drawings do: empty
            ones in all but the last, or, up to any but the last, those of another picture, often of another thing in
            the same image. The scales after a wrong token code what it has left over, and labels are the right tokens.
            A model that has only seen faultless coarse scales believes them: it never has to find a thing by itself at
            the finer ones, and draws nothing where the coarse ones missed it. (Han et al., "Infinity", CVPR 2025,
            section 3.4, with tokens instead of bits.)
        search_steps: how long to try out tokens of the last scale for each mask, where that scale is drawn; see
            `VARTokenizer.encode`.
    """

    def __init__(self, processor: ARGenSegProcessor, slips: float = 0.0, search_steps: int = 0) -> None:
        super().__init__()
        self.slips, self.search_steps = slips, search_steps
        visual_tokenizer: Any = processor.visual_tokenizer
        self.visual_tokenizer = visual_tokenizer.eval().requires_grad_(False)
        self.offset, self.count = processor.visual_token_offset, processor.num_visual_tokens
        self.patch_nums = list(visual_tokenizer.config.patch_nums[: processor.num_scales])
        self.sizes = processor.mask_resize_sizes or [visual_tokenizer.config.image_size]
        images = processor.image_processor
        self.register_buffer("mean", 255 * torch.tensor(images.image_mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(images.image_std).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalises `pixel_values`, and writes the tokens of `masks` into `input_ids` and the right ones into
        `labels`."""
        batch = dict(batch)
        batch["pixel_values"] = (batch["pixel_values"].float() - self.mean) / self.std
        masks = batch.pop("masks", None)
        if masks is not None:
            drawn, right = self.encode(masks)
            for name, ids in (("input_ids", drawn), ("labels", right)):
                places = batch[name] >= self.offset
                batch[name] = batch[name].masked_scatter(places, ids + self.offset)
        return batch

    def encode(self, bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (M, H, W / 8) as bits to the codebook indices (M, T) that stand in the stream, and the right ones."""
        channels = self.visual_tokenizer.config.num_channels
        with torch.autocast(bits.device.type, enabled=False):
            has_doubles = bits.device.type != "mps"
            pictures = 255 * unpack(bits if has_doubles else bits.cpu())[:, None].double()
            for side in self.sizes:
                pictures = resize_like_pillow(pictures, side)
            pictures = (pictures.float() / 255 * 2 - 1).to(bits.device).expand(-1, channels, -1, -1)
            drawn, right = self.quantise(self.visual_tokenizer.latent(pictures))
        if self.search_steps and self.count == drawn.shape[1]:
            drawn, last = self.visual_tokenizer.search(pictures, drawn, self.search_steps), self.patch_nums[-1] ** 2
            right = torch.cat([right[:, :-last], drawn[:, -last:]], dim=1)  # what mends the scales before, right or not
        return drawn[:, : self.count], right[:, : self.count]

    def quantise(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (M, D, h, w) to indices (M, T) with slips, and at each place the index that is right there."""
        quantizer = self.visual_tokenizer.quantize
        if self.slips == 0:
            ids = quantizer.encode(latents)
            return ids, ids
        chance, until, missed = self.draw_slips(len(latents), latents.device)
        other = torch.randperm(len(latents), device=latents.device)
        right: list[torch.Tensor] = []

        def choose(vectors: torch.Tensor, scale: int) -> torch.Tensor:
            ids = quantizer.nearest(vectors, scale).view(len(latents), -1)
            right.append(ids)
            wrong = torch.where(missed, quantizer.log_frequency(scale).argmax(), ids[other])  # the usual code is empty
            return torch.where((scale < until) & (torch.rand(ids.shape, device=ids.device) < chance), wrong, ids)

        return quantizer.encode(latents, choose), torch.cat(right, dim=1)

    def draw_slips(self, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(count, 1) each: the chance of a token to be wrong, before which scale, and whether it is then the empty one
        or that of another picture."""
        rand, last = partial(torch.rand, (count, 1), device=device), len(self.patch_nums) - 1  # nothing mends the last
        missed = rand() < MISSED
        chance = torch.where(missed | (rand() < WHOLE), 1.0, rand()) * (rand() < self.slips)
        return chance, torch.where(missed, last, 1 + (rand() * last).long()), missed


class MissingEncoder(PictureEncoder):
    """All scales but the last that is drawn miss the thing."""

    def __init__(self, processor: ARGenSegProcessor) -> None:
        super().__init__(processor, slips=1.0)

    def draw_slips(self, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        whole = torch.ones(count, 1, device=device)
        return whole, (len(self.patch_nums) - 1) * whole, whole.bool()


def unpack(bits: torch.Tensor) -> torch.Tensor:
    """Masks (M, H, W / 8) as bits to (M, H, W), 0.0 or 1.0."""
    shifts = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    return ((bits[..., None] >> shifts) & 1).flatten(-2).float()


def model_inputs(samples: list[dict[str, Any]], collator: SceneCollator, encoder: PictureEncoder) -> BatchFeature:
    """A batch as any model takes it: all streams in one, and an image for each."""
    batch = encoder(collator(samples))
    index = batch.pop("image_index")
    words = batch.pop("words", None)
    if words is not None:
        length = max(words["input_ids"].shape[1], batch["input_ids"].shape[1])
        fill = {"input_ids": collator.pad_token_id, "attention_mask": 0, "labels": -100}
        for name, value in fill.items():
            both = [F.pad(one[name], (0, length - one[name].shape[1]), value=value) for one in (batch, words)]
            batch[name] = torch.cat(both)
        index = torch.cat([index, words["image_index"]])
    batch["pixel_values"] = batch["pixel_values"][index]
    return BatchFeature({name: value for name, value in batch.items() if not name.startswith("cell_")})
