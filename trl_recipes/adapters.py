"""LoRA adapters for ARGenSeg: where they go, how large they may be, and what else trains in a model made by `from_vlm`.

The adapters sit in the language model; vision tower, visual tokenizer and quantizer never move. A model that
`from_vlm` has just made has parts that were never trained: the rows of its new tokens and the parts that make queries.
They are trained whole, beside the adapters.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import find_adapter_config_file

LANGUAGE_MODEL = r"model\.vlm\.language_model\."
TARGETS = {
    "all": LANGUAGE_MODEL + r"(?:.*\.)?layers\.\d+\..*",
    "attention": LANGUAGE_MODEL + r"(?:.*\.)?layers\.\d+\.[^.]*att[^.]*\..*",
}
# "model." before them: a vision tower may have a position_embedding of its own
NEW_MODULES = ("model.scale_embedding", "model.position_embedding")


def is_adapter(name: str | Path, revision: str | None = None) -> bool:
    """Whether a folder or Hub repository holds adapters, which need the model that they were trained on."""
    return find_adapter_config_file(str(name), revision=revision) is not None


def refuse_adapters(name: str | Path, revision: str | None = None) -> None:
    """Raises ValueError: a folder or Hub repository holds adapters, where a whole model is needed."""
    if is_adapter(name, revision):
        raise ValueError(
            f"adapters alone; first make a whole model of them: python -m trl_recipes.export --model {name}"
        )


def without_adapters(model: Any) -> Any:
    """The model under its adapters, or itself if it has none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_quantised(model: Any) -> bool:
    """Whether the weights under the adapters, if it has any, are packed into few bits."""
    return bool(getattr(without_adapters(model), "is_quantized", False))


def known_everywhere(name: str) -> str:
    """A folder by its whole path, since adapters remember what they are of; a Hub name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def dtype_to_load(name: str, wanted: Any, revision: str | None = None) -> Any:
    """The dtype for `from_pretrained`: as `wanted`, but weights that lie there quantised have theirs already."""
    config = AutoConfig.from_pretrained(name, revision=revision or "main")
    return "auto" if getattr(config, "quantization_config", None) else wanted


def load_adapted(folder: str | Path, dtype: torch.dtype) -> PeftModel:
    """The base that adapters name, loaded in a dtype, with them on it.

    Raises:
        ValueError: the base is not known or not to be had, or its weights are quantised and have no such dtype.
    """
    config = PeftConfig.from_pretrained(str(folder))
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            "its adapter_config.json does not say what model the adapters are of (base_model_name_or_path)"
        )
    try:
        refuse_adapters(base, config.revision)
        model = _load(base, dtype, config.revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"the model that the adapters are of, {base}: {error}") from error
    return PeftModel.from_pretrained(model, str(folder))


def load_whole(name: str | Path) -> tuple[Any, Any]:
    """A model in single precision, and its processor; of adapters their base with the adapters worked in, with the
    generation configuration and the processor that lie beside the adapters, if they do.

    Raises:
        ValueError: see `load_adapted`; or the weights are quantised.
    """
    if not is_adapter(name):
        return _load(str(name), torch.float32), AutoProcessor.from_pretrained(name)
    adapted = load_adapted(name, torch.float32)
    config, model = adapted.active_peft_config, adapted.merge_and_unload()
    if Path(name, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(name))
    if Path(name, "processor_config.json").is_file():
        return model, AutoProcessor.from_pretrained(name)
    return model, AutoProcessor.from_pretrained(config.base_model_name_or_path, revision=config.revision or "main")


def _load(name: str, dtype: torch.dtype, revision: str | None = None) -> Any:
    if dtype_to_load(name, dtype, revision) != dtype:
        raise ValueError(f"the weights of {name} are quantised: take the model that they were made of")
    return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, revision=revision or "main")


@dataclass
class AdapterSizes:
    """Numbers of parameters: of the adapters, of new parts that train whole, and of the model without adapters."""

    adapters: int
    new_parts: int
    model: int

    @property
    def share(self) -> float:
        return self.adapters / self.model

    def __str__(self) -> str:
        text = f"adapters: {self.adapters:,} parameters, {self.share:.2%} of the model's {self.model:,}"
        return text + (f"; new parts that train whole: {self.new_parts:,}" if self.new_parts else "")


def target_names(model: nn.Module, targets: str) -> list[str]:
    """Full names of the linear layers of the language model that get an adapter."""
    pattern = re.compile(TARGETS[targets])
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and pattern.fullmatch(name)]


def choose_rank(model: nn.Module, targets: str, largest: int, max_share: float) -> int:
    """The largest rank, up to `largest`, with which the adapters stay below `max_share` of the model's parameters.

    Raises:
        ValueError: even rank 1 is too large, or there is nothing to adapt.
    """
    if largest < 1:
        raise ValueError(f"--lora_rank {largest}: the smallest rank is 1")
    modules = [model.get_submodule(name) for name in target_names(model, targets)]
    if not modules:
        raise ValueError(f"no linear layers to adapt: no module is called {TARGETS[targets]}")
    per_rank = sum(module.in_features + module.out_features for module in modules)
    total = sum(parameter.numel() for parameter in model.parameters())
    rank = min(largest, (int(max_share * total) - 1) // per_rank)
    if rank < 1:
        raise ValueError(
            f"adapters of rank 1 are {per_rank / total:.2%} of the model, and --max_adapter_share is {max_share:.2%}: "
            "adapt --lora_targets attention alone, or raise the share"
        )
    return rank


def is_just_made(model: nn.Module) -> bool:
    """Whether the parts that draw have never been trained: `from_vlm` starts them at zero."""
    parts = (model.model.generation_projector[-1], model.model.scale_embedding, model.model.position_embedding)
    return not any(bool(parameter.any()) for part in parts for parameter in part.parameters())


def new_token_rows(model: nn.Module) -> dict[str, list[int]]:
    """Rows of embedding and head that `from_vlm` has added: of `<gen_start>`, `<gen_end>` and every visual token."""
    config = model.config
    drawn = [config.gen_start_token_id]
    drawn += range(config.visual_token_offset, config.visual_token_offset + config.visual_vocab_size)
    read = [config.gen_start_token_id, config.gen_end_token_id]
    if model.lm_head.weight is model.get_input_embeddings().weight:
        return {"embed_tokens": sorted({*drawn, *read})}
    return {"embed_tokens": sorted(read), "lm_head": sorted(drawn)}


def lora_config(
    model: nn.Module,
    rank: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: str = "all",
    max_share: float = 0.01,
    new_parts: bool | None = None,
) -> LoraConfig:
    """The adapters' configuration, for `get_peft_model` or any trainer's `peft_config`.

    Args:
        rank: the largest; made smaller where the adapters would be `max_share` of the model or more.
        alpha: default: twice the rank.
        targets: "all" linear layers of the language model, or those of its "attention".
        new_parts: train the new tokens' rows and the parts that make queries; default: if they never were.

    Raises:
        ValueError: the adapters would be too large.
    """
    rank = choose_rank(model, targets, rank, max_share)
    options: dict[str, Any] = {}
    if is_just_made(model) if new_parts is None else new_parts:
        projector = model.model.generation_projector
        linear = [i for i, layer in enumerate(projector) if isinstance(layer, nn.Linear)]
        options["modules_to_save"] = [f"model.generation_projector.{i}" for i in linear] + list(NEW_MODULES)
        options["trainable_token_indices"] = new_token_rows(model)
    leaves = sorted({re.escape(name.rpartition(".")[2]) for name in target_names(model, targets)})
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=f"{TARGETS[targets].removesuffix('.*')}(?:.*\\.)?(?:{'|'.join(leaves)})",
        **options,
    )


def add_adapters(model: nn.Module, config: LoraConfig, max_share: float = 0.01) -> tuple[PeftModel, AdapterSizes]:
    """The model with adapters, everything else frozen.

    Raises:
        ValueError: the adapters are `max_share` of the model or more, or something trains that should not.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    adapted = get_peft_model(model, config)
    sizes = {"adapters": 0, "new_parts": 0}
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        is_new = "modules_to_save" in name or "token_adapter" in name
        if not is_new and "lora_" not in name:
            raise ValueError(f"{name} would train, but it is neither an adapter nor a new part")
        sizes["new_parts" if is_new else "adapters"] += parameter.numel()
    found = AdapterSizes(**sizes, model=count)
    if found.share >= max_share:
        raise ValueError(f"{found}; the limit is {max_share:.2%}: lower --lora_rank or raise --max_adapter_share")
    return adapted, found
