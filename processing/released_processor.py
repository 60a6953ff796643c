"""The processor of a released checkpoint: tokenizer, image size, wording and mask geometry, read from its folder."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, GotOcr2ImageProcessorPil, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import cached_file

from .chat_template import adds_bos, internvl_format, make_chat_template
from .released_tokenizer import load_released_tokenizer, read_json

MODEL_TYPE = "internvl_chat"
TEMPLATE = "internvl2_5"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json")
# InternVL 2.5's own, with which every released conversation begins
SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
# the wording of referring segmentation; the image's line break and this space stand before it, as released
SEGMENTATION_PROMPT = (
    " Given the following instructions: {prompt}; please perform referring segmentation on this image."
)
SEGMENTATION_ANSWER = "Sure, the segmentation result: {mask}."
MASK_SIDE = 512  # masks are squashed to this square first, whatever the size of the picture


def find_released_folder(path: Any, subfolder: str = "", **kwargs: Any) -> Path | None:
    """The folder of a released checkpoint, downloaded if `path` is a Hub name; None if it is none."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    file = cached_file(path, "config.json", subfolder=subfolder, **kwargs, **quiet)
    if file is None or read_json(Path(file)).get("model_type") != MODEL_TYPE:
        return None
    if os.path.isdir(path):
        return Path(path, subfolder)
    kwargs.pop("proxies", None)
    return Path(snapshot_download(str(path), **kwargs), subfolder)


def released_processor_parts(folder: Path, vq_model: PreTrainedModel | None = None) -> dict[str, Any]:
    """Arguments of `ARGenSegProcessor` for a released folder.

    Args:
        folder: `config.json`, the weights (the VQ-VAE among them, or as `vae_*.pth`) and the tokenizer, which may also
            lie in `tokenizer/` beside the folder.
        vq_model: a visual tokenizer to take instead of the folder's.

    Raises:
        ValueError: something is missing or broken, does not fit together, or was trained in a way that is not known.
    """
    file = folder / "config.json"
    config = read_json(file)
    if config.get("template", TEMPLATE) != TEMPLATE or config.get("pad2square") or config.get("dynamic_image_size"):
        raise ValueError(f"{file}: only the released template {TEMPLATE} and one squashed image are known, no padding")
    try:
        side = config.get("force_image_size") or config["vision_config"]["image_size"]
        grid = side // config["vision_config"]["patch_size"] * config["downsample_ratio"]
        vocab_size = config["llm_config"]["vocab_size"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is no configuration of a released ARGenSeg: {error!r}") from error
    if vq_model is None:
        vq_model = load_visual_tokenizer(folder)
    picture_side = vq_model.config.image_size
    tokenizer = load_released_tokenizer(_tokenizer_folder(folder), vocab_size, vq_model.config.vocab_size)
    return {
        "image_processor": GotOcr2ImageProcessorPil(
            size={"height": side, "width": side}, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
        ),
        "tokenizer": tokenizer,
        "vq_model": vq_model,
        # a conversation without a system message gets InternVL's own
        "chat_template": make_chat_template(internvl_format(system=SYSTEM_MESSAGE), with_bos=adds_bos(tokenizer)),
        "image_seq_length": int(grid) ** 2,
        "mask_resize_sizes": [MASK_SIDE] if picture_side == MASK_SIDE else [MASK_SIDE, picture_side],
        "segmentation_prompt": SEGMENTATION_PROMPT,
        "segmentation_answer": SEGMENTATION_ANSWER,
    }


def load_visual_tokenizer(folder: Path) -> PreTrainedModel:
    """The VQ-VAE of a released folder, in fp32: in bf16 the nearest codebook entries, that is the ids, come out
    different."""
    try:
        config = AutoConfig.for_model("var_tokenizer")  # its sizes come from the weights
    except ValueError as error:
        raise ValueError(
            "a released checkpoint needs the classes of the model: import modeling_argenseg first"
        ) from error
    return AutoModel.from_pretrained(folder, config=config, dtype=torch.float32)


def _tokenizer_folder(folder: Path) -> Path:
    for place in (folder, folder.parent / "tokenizer"):
        if any((place / name).exists() for name in TOKENIZER_FILES):
            return place
    return folder
