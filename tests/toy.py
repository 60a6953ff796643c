"""A model of toy size that has really learned one photograph: it draws what is there and says so of what is not.

No weight is rigged and no logits are forced, so that the program is tested on the path that a user takes.
"""

from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from transformers import GotOcr2ImageProcessorPil

from modeling_argenseg import ARGenSegForConditionalGeneration
from processing import ARGenSegProcessor
from trl_recipes.text_tokenizer import train_text_tokenizer

SIZE = (60, 40)  # width and height of the photograph
REQUESTS = ["the left square", "the ball on the right"]
BOTH = "both shapes"  # answered with two masks
ABSENT = {"the whale": "There is no whale.", "the plane": "There is no plane."}


def photograph() -> Image.Image:
    pixels = np.full((SIZE[1], SIZE[0], 3), 200, np.uint8)
    pixels[true_masks()[0]] = (200, 30, 30)
    pixels[true_masks()[1]] = (30, 30, 200)
    return Image.fromarray(pixels)


def true_masks() -> list[np.ndarray]:
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    square = (x > 5) & (x < 25) & (y > 10) & (y < 30)
    return [square, np.hypot(x - 45, y - 20) < 11]


def build(visual_tokenizer: Any = None) -> tuple[ARGenSegForConditionalGeneration, ARGenSegProcessor]:
    """Random weights; images of 28 px, pictures of 4 scales (or of another visual tokenizer)."""
    words = [
        *REQUESTS,
        BOTH,
        *ABSENT,
        *ABSENT.values(),
        "Please segment in this image. Sure, the segmentation result: .",
    ]
    visual_tokenizer = visual_tokenizer or tiny.visual_tokenizer()
    text_tokenizer = train_text_tokenizer(words, 340, visual_tokenizer.config.vocab_size, context=256)
    side = {"height": tiny.IMAGE_PIXELS, "width": tiny.IMAGE_PIXELS}
    processor = ARGenSegProcessor(
        GotOcr2ImageProcessorPil(size=side), text_tokenizer, visual_tokenizer, image_seq_length=tiny.IMAGE_TOKENS
    )
    text = tiny.text_config(
        vocab_size=len(text_tokenizer),
        pad_token_id=text_tokenizer.pad_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    config = tiny.config(
        tiny.internvl_config(text, image_token_id=processor.image_token_id),
        visual_tokenizer_config=visual_tokenizer.config,
        gen_start_token_id=processor.gen_start_token_id,
        gen_end_token_id=processor.gen_end_token_id,
        visual_token_offset=processor.visual_token_offset,
    )
    model = ARGenSegForConditionalGeneration(config)
    model.set_visual_tokenizer(visual_tokenizer)
    model.generation_config.update(
        eos_token_id=text_tokenizer.eos_token_id, pad_token_id=text_tokenizer.pad_token_id, max_new_tokens=32
    )
    return model, processor


def lessons(processor: ARGenSegProcessor) -> dict[str, torch.Tensor]:
    """The photograph with every request and its answer, as one batch; labels on what the assistant says."""
    image = photograph()
    chats: list[Any] = []
    for prompt, mask in zip(REQUESTS, true_masks(), strict=True):
        chats.append(processor.build_segmentation_conversation(image, prompt, mask))
    masks = [{"type": "mask", "mask": mask} for mask in true_masks()]
    before, after = ({"type": "text", "text": text} for text in processor.segmentation_answer.split("{mask}"))
    drawn = {"role": "assistant", "content": [before, *masks, after]}
    chats.append([*processor.build_segmentation_conversation(image, BOTH), drawn])
    for prompt, answer in ABSENT.items():
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        chats.append([*processor.build_segmentation_conversation(image, prompt), said])
    batch = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    spoken = torch.as_tensor(batch.pop("assistant_masks")).bool()
    return {**batch, "labels": batch["input_ids"].masked_fill(~spoken, -100)}


def learn(model: ARGenSegForConditionalGeneration, batch: dict[str, torch.Tensor], enough: float = 0.02) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(400):
        loss = model(**batch).loss
        if loss < enough:
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the toy model did not learn its photograph: the loss is still {loss.item():.3f}")
