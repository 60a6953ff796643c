"""A processor of toy size. Its visual tokenizer draws 4x4 grey cells: simple enough to say what every test must see."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    GotOcr2ImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from processing import ARGenSegProcessor

NUM_CODES = 8
SIDE = 16
PATCH_NUMS = [1, 2, 4]
T = 21
SPECIAL = {
    "image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "gen_start_token": "<gen_start>",
    "gen_end_token": "<gen_end>",
    "im_start_token": "<|im_start|>",
}


class CellConfig(PreTrainedConfig):
    model_type = "cell_tokenizer_for_tests"
    image_size: int = SIDE
    num_channels: int = 3
    vocab_size: int = NUM_CODES


CellConfig.patch_nums = property(lambda self: PATCH_NUMS)


class CellTokenizer(PreTrainedModel):
    """Scale by scale the mean grey of each cell, in `NUM_CODES` steps; the last scale is the picture."""

    config_class = CellConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.decode_calls = 0
        self.encode_batches = []
        self.post_init()

    def encode(self, pixel_values, search_steps=None):
        self.encode_batches.append(len(pixel_values))
        self.search_steps = search_steps
        grey_B1HW = pixel_values.mean(dim=1, keepdim=True) / 2 + 0.5
        cells = [torch.nn.functional.adaptive_avg_pool2d(grey_B1HW, side).flatten(1) for side in PATCH_NUMS]
        return (torch.cat(cells, dim=1) * self.scale * (NUM_CODES - 1)).round().long()

    def decode(self, ids):
        self.decode_calls += 1
        grey = ids[:, -16:].view(-1, 1, 4, 4).float() / (NUM_CODES - 1) * 2 - 1
        return torch.nn.functional.interpolate(grey, size=SIDE).expand(-1, 3, -1, -1)


AutoConfig.register("cell_tokenizer_for_tests", CellConfig, exist_ok=True)
AutoModel.register(CellConfig, CellTokenizer, exist_ok=True)


def make_tokenizer(visual_codes=range(NUM_CODES), special=SPECIAL, **kwargs):
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>", extra_special_tokens=special, **kwargs
    )
    tokenizer.add_tokens([f"<visual token {code:06d}>" for code in visual_codes], special_tokens=True)
    return tokenizer


def make_processor(tokenizer=None, vq_model="cells", **kwargs):
    return ARGenSegProcessor(
        GotOcr2ImageProcessorPil(size={"height": 8, "width": 8}),
        tokenizer or make_tokenizer(),
        CellTokenizer(CellConfig()) if vq_model == "cells" else vq_model,
        image_seq_length=kwargs.pop("image_seq_length", 4),
        **kwargs,
    )


@pytest.fixture
def toys():
    """The builders above, for tests that need variants."""
    return SimpleNamespace(
        processor=make_processor,
        tokenizer=make_tokenizer,
        vq_model=lambda: CellTokenizer(CellConfig()),
        special=SPECIAL,
        num_tokens=T,
        num_codes=NUM_CODES,
    )


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def image():
    """20 wide, 10 high."""
    return Image.new("RGB", (20, 10), "red")


@pytest.fixture
def mask():
    """The left half of `image`."""
    mask = np.zeros((10, 20), dtype=bool)
    mask[:, :10] = True
    return mask
