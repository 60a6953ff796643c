"""Models to measure, and what they are asked: the small published one, and sizes with random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, InternVLConfig, LlamaConfig

from modeling_argenseg import ARGenSegConfig, ARGenSegForConditionalGeneration, VARTokenizer, VARTokenizerConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = "hub_cards/argenseg-tiny"
VOCABULARY = 96_653  # of the released checkpoint
IMAGE_ID, EOS_ID = 92_546, 2
FIRST_NEW_ID = 92_554  # <gen_start>, <gen_end>, a placeholder and the codebook follow
BEFORE, AFTER = 9, 1  # words of the answer around its picture, as the released wording has
PROMPT = 300


@dataclass(frozen=True)
class Size:
    """Layers and widths of a model with random weights."""

    text: dict[str, int]
    vision: dict[str, int]
    gpu_only: bool = False

    def config(self) -> ARGenSegConfig:
        text = LlamaConfig(
            **self.text, vocab_size=VOCABULARY, max_position_embeddings=8192, pad_token_id=0, eos_token_id=EOS_ID,
            tie_word_embeddings=False,
        )  # fmt: skip
        vlm = InternVLConfig(
            vision_config={**self.vision, "image_size": [448, 448], "patch_size": [14, 14]}, text_config=text,
            image_token_id=IMAGE_ID, image_seq_length=256, tie_word_embeddings=False,
        )  # fmt: skip
        return ARGenSegConfig(
            vlm_config=vlm, visual_tokenizer_config=VARTokenizerConfig(), gen_start_token_id=FIRST_NEW_ID,
            gen_end_token_id=FIRST_NEW_ID + 1, visual_token_offset=FIRST_NEW_ID + 3,
        )  # fmt: skip


def layers(count: int, width: int, heads: int, inner: int, **more: int) -> dict[str, int]:
    sizes = {"num_hidden_layers": count, "hidden_size": width, "num_attention_heads": heads, "intermediate_size": inner}
    return sizes | more


SMALL_VISION = layers(8, 512, 8, 2048)
SIZES = {
    "reference": Size(layers(8, 512, 8, 1376, num_key_value_heads=8), SMALL_VISION),
    "mid": Size(layers(16, 1024, 16, 2752, num_key_value_heads=8), SMALL_VISION),
    "8b": Size(layers(32, 4096, 32, 14336, num_key_value_heads=8), layers(24, 1024, 16, 4096), gpu_only=True),
}


@dataclass
class Case:
    """A model with one image and several prompts of different lengths on it.

    Attributes:
        prompts: token ids of the prompts, each (L,).
        pixel_values: (1, 3, H, W).
        answer_ids: the answer, `<gen_start>` in the picture's place, its end included.
        size: (height, width) that masks are stretched to.
    """

    name: str
    model: Any
    visual_tokenizer: VARTokenizer
    prompts: list[torch.Tensor]
    pixel_values: torch.Tensor
    answer_ids: list[int]
    size: tuple[int, int]

    @property
    def before(self) -> list[int]:
        return self.answer_ids[: self.answer_ids.index(self.model.config.gen_start_token_id) + 1]

    @property
    def after(self) -> list[int]:
        return self.answer_ids[len(self.before) : -1]

    def batch(self, count: int, images: int) -> dict[str, torch.Tensor]:
        """The first `count` prompts, left-padded; `images` copies of the image (0: none)."""
        rows = [self.prompts[i % len(self.prompts)] for i in range(count)]
        length = max(len(row) for row in rows)
        pad = torch.nn.functional.pad
        inputs = {
            "input_ids": torch.stack([pad(row, (length - len(row), 0)) for row in rows]),
            "attention_mask": torch.stack([pad(torch.ones_like(row), (length - len(row), 0)) for row in rows]),
        }
        return inputs | ({"pixel_values": self.pixel_values.repeat(images, 1, 1, 1)} if images else {})


class SaysTheAnswer(ARGenSegForConditionalGeneration):
    """A model that writes a given answer whatever it computes, as random weights would not; the work is the same."""

    answer: tuple[list[int], list[int], int] = ([], [], 0)  # before the picture, after it, the end

    def _text_scores(self, logits: torch.Tensor) -> torch.Tensor:
        before, after, end = self.answer
        scores = super()._text_scores(logits)
        if logits.ndim == 2:  # one step; it comes only after the whole answer has been kept
            scores[:, end] = torch.inf
            return scores
        expected = before if scores.shape[1] == len(before) else after
        scores[:, torch.arange(len(expected)), expected] = torch.inf
        return scores


def build(name: str, device: str, dtype: torch.dtype) -> Case:
    """A model of that size, which gives the same answer whatever it computes.

    Raises:
        ValueError: the size needs a GPU.
    """
    case = tiny(device, dtype) if name == "tiny" else random(name, device, dtype)
    case.model.__class__ = SaysTheAnswer
    case.model.answer = (case.before, case.after, case.answer_ids[-1])
    options = case.model.generation_config
    options.update(eos_token_id=case.answer_ids[-1], pad_token_id=0, max_new_tokens=48)
    options.picture_answer_ids = case.answer_ids
    options.picture_logit_adjustment = 0.0  # the released procedure knows none
    return case


def tiny(device: str, dtype: torch.dtype) -> Case:
    """The small published model, asked for eight things in the example photograph."""
    processor = AutoProcessor.from_pretrained(ROOT / TINY)
    model = AutoModelForImageTextToText.from_pretrained(ROOT / TINY, dtype=dtype).to(device).eval()
    image = Image.open(ROOT / "examples" / "sheep.jpg")
    wanted = [
        "the sheep",
        "the grass",
        "the sky",
        "the white sheep on the left",
        "the head",
        "the legs",
        "it",
        "animal",
    ]
    chats = [processor.build_segmentation_conversation(image, one) for one in wanted]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return Case(
        "tiny", model, processor.visual_tokenizer.to(device), [ids[kept].to(device) for ids, kept in rows],
        inputs["pixel_values"][:1].to(device, dtype), processor.picture_answer_ids, (image.height, image.width),
    )  # fmt: skip


def random(name: str, device: str, dtype: torch.dtype) -> Case:
    size = SIZES[name]
    if size.gpu_only and not device.startswith("cuda"):
        raise ValueError(f"the size {name} needs a GPU: pass --device cuda")
    torch.manual_seed(0)
    config = size.config()
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = ARGenSegForConditionalGeneration(config).eval()
        torch.set_default_dtype(default)
        visual_tokenizer = VARTokenizer(VARTokenizerConfig()).eval()
    torch.nn.init.normal_(visual_tokenizer.quantize.embedding.weight)
    model.model.quantizer.float()
    model.set_visual_tokenizer(visual_tokenizer)
    generator = np.random.default_rng(0)
    image = torch.cat([torch.from_numpy(generator.integers(10, 1000, 20)), torch.full((256,), IMAGE_ID)])
    prompts = []
    for shorter in (0, 2, 5, 7, 1, 3, 8, 4):
        words = torch.from_numpy(generator.integers(10, 1000, PROMPT - len(image) - shorter))
        prompts.append(torch.cat([image, words]).to(device))
    answer = [*range(11, 11 + BEFORE), FIRST_NEW_ID, *range(30, 30 + AFTER), EOS_ID]
    pixels = torch.from_numpy(generator.standard_normal((1, 3, 448, 448), dtype=np.float32)).to(device, dtype)
    return Case(name, model, visual_tokenizer, prompts, pixels, answer, (480, 640))
