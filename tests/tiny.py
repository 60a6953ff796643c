"""Models of toy size with seeded random weights, large enough that a wrong mask, position or query changes the ids."""

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)

from modeling_argenseg import (
    ARGenSegConfig,
    ARGenSegForConditionalGeneration,
    HybridInternVLConfig,
    VARTokenizer,
    VARTokenizerConfig,
)

PAD, EOS, IMAGE = 0, 1, 2  # 3..39 are words
GEN_START, GEN_END, FIRST_VISUAL = 40, 41, 42
CODES = 32
VOCAB = FIRST_VISUAL + CODES + 2  # two more words, so that the visual rows are not the tail of the head
WORDS = [*range(3, GEN_START), VOCAB - 2, VOCAB - 1]
SIDES = (1, 2, 3, 4)
T = sum(side * side for side in SIDES)
IMAGE_PIXELS, IMAGE_TOKENS = 28, 1
CAT, DOG, SURE, DONE = 10, 11, 12, 13  # words with a meaning


def tokenizer_config(**changes: Any) -> VARTokenizerConfig:
    sizes = dict(
        image_size=16, base_channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, norm_num_groups=4,
        latent_channels=8, vocab_size=CODES, patch_nums=SIDES,
    )  # fmt: skip
    return VARTokenizerConfig(**(sizes | changes))


def visual_tokenizer(seed: int = 0, **changes: Any) -> VARTokenizer:
    """A VAR tokenizer whose codebook is spread out, so that pictures use many codes."""
    torch.manual_seed(seed)
    model = VARTokenizer(tokenizer_config(**changes)).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def text_config(kind: type = LlamaConfig, **changes: Any) -> PreTrainedConfig:
    sizes = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, pad_token_id=PAD, bos_token_id=None,
        eos_token_id=EOS, tie_word_embeddings=False,
    )  # fmt: skip
    return kind(**(sizes | changes))


def internvl_config(text: PreTrainedConfig | None = None, **changes: Any) -> InternVLConfig:
    """Images of 28 px: four patches, shuffled into one image token."""
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=IMAGE_PIXELS, patch_size=14, layer_scale_init_value=1.0, initializer_range=0.3,
    )  # fmt: skip
    fields = dict(
        vision_config=vision, text_config=text or text_config(), image_token_id=IMAGE, image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )  # fmt: skip
    return InternVLConfig(**(fields | changes))


def hybrid_config() -> HybridInternVLConfig:
    """Images of 8 px through a convolutional trunk and one transformer layer: four patches, one image token."""
    stages = [[3, 1, 1, 4, 1], [3, 2, 2, 6, 1], [3, 2, 2, 8, 1]]  # stride 8 with the stem; tokens every 4 px
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        stem_channels=4, stages=stages,
    )  # fmt: skip
    return HybridInternVLConfig(
        vision_config=vision, text_config=text_config(), image_token_id=IMAGE, image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )  # fmt: skip


def llava_config(**changes: Any) -> LlavaConfig:
    """Images of 28 px: four image tokens."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=IMAGE_PIXELS,
        patch_size=14,
    )  # fmt: skip
    fields = dict(vision_config=vision, text_config=text_config(), image_token_id=IMAGE, tie_word_embeddings=False)
    return LlavaConfig(**(fields | changes))


GRID = [2, 3]  # rows and columns of the tokens of an image of 16 x 24 px


def qwen_vl_config(kind: type) -> PreTrainedConfig:
    """A configuration of the Qwen-VL family; patches of 4 px, four to an image token."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.3, pad_token_id=PAD,
        eos_token_id=EOS, bos_token_id=None, tie_word_embeddings=False, rope_parameters=rope,
    )  # fmt: skip
    vision = {
        "qwen2_vl": dict(embed_dim=16, hidden_size=32, mlp_ratio=2),
        "qwen2_5_vl": dict(hidden_size=16, intermediate_size=24, out_hidden_size=32, window_size=16),
        "qwen3_vl": dict(
            hidden_size=16, intermediate_size=24, out_hidden_size=32, num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
        ),
    }[kind.model_type]  # fmt: skip
    vision |= dict(depth=2, num_heads=2, patch_size=4, initializer_range=0.3)
    if kind.model_type == "qwen2_5_vl":
        vision |= dict(fullatt_block_indexes=[1])
    ids = dict(image_token_id=IMAGE, video_token_id=VOCAB - 1, vision_start_token_id=VOCAB - 2)
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def config(vlm: PreTrainedConfig | None = None, **changes: Any) -> ARGenSegConfig:
    fields = dict(
        vlm_config=vlm or internvl_config(), visual_tokenizer_config=tokenizer_config(), gen_start_token_id=GEN_START,
        gen_end_token_id=GEN_END, visual_token_offset=FIRST_VISUAL,
    )  # fmt: skip
    return ARGenSegConfig(**(fields | changes))


def model(
    vlm: PreTrainedConfig | None = None, seed: int = 0, attention: str = "sdpa", **changes: Any
) -> ARGenSegForConditionalGeneration:
    """`attention` is the implementation; `changes` go to `ARGenSegConfig`, such as `scale_attention="block"`."""
    torch.manual_seed(seed)
    net = ARGenSegForConditionalGeneration(config(vlm, **changes))
    net.set_attn_implementation(attention)
    net.set_visual_tokenizer(visual_tokenizer())
    net.generation_config.update(pad_token_id=PAD, eos_token_id=EOS)
    return net.eval()


def pictures(count: int, seed: int = 0, length: int = T) -> torch.Tensor:
    """Random visual ids, as they stand in a stream (count, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CODES, (count, length), generator=generator) + FIRST_VISUAL


def images(count: int, seed: int = 0, size: int = IMAGE_PIXELS) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def stream(*parts: Any) -> torch.Tensor:
    """One row (1, L) from ids and tensors of ids; a picture is given by its T visual ids."""
    flat: list[int] = []
    for part in parts:
        flat += part.flatten().tolist() if isinstance(part, torch.Tensor) else [part]
    return torch.tensor([flat])


def left_padded(rows: list[torch.Tensor], value: int = PAD, extra: int = 0) -> dict[str, torch.Tensor]:
    """Rows (1, l) as `input_ids` and `attention_mask`."""
    length = max(row.shape[1] for row in rows) + extra
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(row, (length - row.shape[1], 0), value=value) for row in rows])
    mask = torch.cat([pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


class Script(LogitsProcessor):
    """Makes each row write its own text, `<gen_start>` included, and `EOS` at the end; pictures are the model's own."""

    def __init__(self, prompt_length: int, *texts: list[int], pad: int = PAD) -> None:
        self.prompt_length, self.texts, self.pad = prompt_length, texts, pad

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        for row, text in enumerate(self.texts):
            written = input_ids[row, self.prompt_length :]
            is_visual = (written >= FIRST_VISUAL) & (written < FIRST_VISUAL + CODES)
            step = int(((written != self.pad) & ~is_visual).sum())
            forced[row, text[step] if step < len(text) else EOS] = 0.0
        return forced


def generate(net: PreTrainedModel, prompts: dict[str, torch.Tensor], *texts: list[int], **options: Any) -> Any:
    """Greedy generation along a script, one text for each row; returns the output object."""
    pad = options.get("pad_token_id", PAD)
    script = Script(prompts["input_ids"].shape[1], *texts, pad=pad)
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True} | options
    return net.generate(**prompts, logits_processor=LogitsProcessorList([script]), **options)


def answers(sequences: torch.Tensor, prompt_length: int, pad: int = PAD) -> list[list[int]]:
    """Each row after the prompt, without the padding on its right."""
    rows = [row[prompt_length:].tolist() for row in sequences]
    return [row[: len(row) - next((i for i, t in enumerate(reversed(row)) if t != pad), len(row))] for row in rows]


def drawn(answer: list[int]) -> list[int]:
    return [t for t in answer if FIRST_VISUAL <= t < FIRST_VISUAL + CODES]


# four ragged prompts, two images, a picture in the history of the last
PROMPTS = [
    stream(IMAGE, CAT, DOG, 7, 8),
    stream(DOG, 5),
    stream(9, CAT, 6),
    stream(IMAGE, CAT, GEN_START, pictures(1), DONE, DOG, DOG),
]
TEXTS = [
    [SURE, GEN_START, DONE],
    [GEN_START, DONE, SURE, GEN_START, CAT],
    [SURE, DOG, CAT, DONE],
    [CAT, CAT, CAT, CAT, GEN_START],
]


def images_of(*rows: int) -> dict[str, torch.Tensor]:
    """The images of the given prompts, or no argument at all."""
    chosen = [images(2)[(0, None, None, 1)[row]] for row in rows if row in (0, 3)]
    return {"pixel_values": torch.stack(chosen)} if chosen else {}


def visual_logits(net: PreTrainedModel, sequence: torch.Tensor, start: int, **kwargs: Any) -> torch.Tensor:
    """Teacher-forced logits (T, V) of the picture whose `<gen_start>` stands at `start` of a row (L,)."""
    logits = net(sequence[None], **kwargs).logits[0]
    return logits[start : start + T, FIRST_VISUAL : FIRST_VISUAL + CODES]


def starts_of(sequence: torch.Tensor, after: int = 0) -> list[int]:
    """Columns of the `<gen_start>` of a row (L,)."""
    return [i for i, token in enumerate(sequence.tolist()) if token == GEN_START and i >= after]
