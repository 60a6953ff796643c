"""Visual tokenizers by name, for the recipes that need one."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from modeling_argenseg import VARTokenizer
from processing.processing_argenseg import VISUAL_TOKENIZER_FOLDER

from .command_line import loading

KINDS = ("var_tokenizer", "internvl_chat")  # ours, and a released checkpoint, which holds one


def load_visual_tokenizer(source: str) -> VARTokenizer:
    """A visual tokenizer in fp32: in bf16 the nearest codes come out different.

    Args:
        source: its folder or Hub name, the folder of a model that has one, or VAR's own `.pth` file.

    Raises:
        ValueError: there is none.
    """
    if source.endswith(".pth"):
        if not Path(source).is_file():
            raise ValueError(f"no file {source!r}")
        return VARTokenizer.from_pretrained(source, dtype=torch.float32)
    if Path(source, VISUAL_TOKENIZER_FOLDER).is_dir():
        source = str(Path(source, VISUAL_TOKENIZER_FOLDER))
    with loading(source):
        kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        if kind not in KINDS:
            raise ValueError(f"this is a {kind}, and no visual tokenizer ({KINDS[0]})")
        return VARTokenizer.from_pretrained(source, dtype=torch.float32)
