"""Folders of plain vision-language models of toy size, laid out as the Hub has those of InternVL and LLaVA."""

import json
from pathlib import Path

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
)

SPARE_ROWS = 20  # of the embedding, beyond the tokenizer's tokens, as published models have them
INTERNVL_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ block['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# a system message of its own where there is none, image tokens in the template
QWEN_CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ block['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# images before text, a space after every text, and nothing that ends an answer
LLAVA_CHAT = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for block in message['content'] if block['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for block in message['content'] if block['type'] == 'text' %}{{ block['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def byte_tokenizer(special: list[str], bos: str | None = None, **options) -> PreTrainedTokenizerFast:
    """One token per byte, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, model_max_length=4096, **options)


def text_config(tokenizer: PreTrainedTokenizerFast, kind: type, **changes) -> PreTrainedConfig:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return tiny.text_config(kind, vocab_size=len(tokenizer) + SPARE_ROWS, **(ids | changes))


def write(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def internvl(folder: Path) -> Path:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    names = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    tokenizer = byte_tokenizer(
        special, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=names,
        chat_template=INTERNVL_CHAT,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    write(folder, tiny.internvl_config(text_config(tokenizer, Qwen2Config), image_token_id=image), tokenizer)
    side = {"height": tiny.IMAGE_PIXELS, "width": tiny.IMAGE_PIXELS}
    GotOcr2ImageProcessorPil(size=side, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.2]).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    kinds = {"image_processor_type": "GotOcr2ImageProcessorFast", "processor_class": "InternVLProcessor"}
    file.write_text(json.dumps(json.loads(file.read_text()) | kinds))
    return folder


def qwen3_vl(folder: Path) -> Path:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = byte_tokenizer(
        special, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN_CHAT
    )  # fmt: skip
    config = tiny.qwen_vl_config(Qwen3VLConfig)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
    config.text_config.update({"vocab_size": len(tokenizer) + SPARE_ROWS} | ids)
    write(folder, config, tokenizer)
    Qwen2VLImageProcessorPil(patch_size=4, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    special = ["<s>", "</s>", "<image>", "<pad>"]
    tokenizer = byte_tokenizer(special, "<s>", eos_token="</s>", pad_token="<pad>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = text_config(tokenizer, type(tiny.text_config()))
    write(folder, tiny.llava_config(text_config=text, image_token_id=image), tokenizer)
    side = tiny.IMAGE_PIXELS
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": LLAVA_CHAT}))
    return folder
