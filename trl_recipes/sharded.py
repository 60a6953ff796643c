"""Weights that are spread over processes (FSDP, DeepSpeed), and what models that draw need of them.

FSDP2 trains and draws, FSDP1 trains alone. ZeRO stage 2 keeps the weights whole and needs nothing. Stage 3 is refused:
every process has to run every module equally often there, and how often the head runs depends on the labels.
"""

from pathlib import Path

from peft import PeftModel
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from .adapters import load_adapted, without_adapters

WITHOUT_DRAWING = "--eval_strategy no --load_best_model_at_end False, and measure afterwards by trl_recipes.evaluate"


def refuse_zero3() -> None:
    """To be asked before anything is loaded: the stage takes apart whatever is.

    Raises:
        ValueError: ZeRO stage 3 is on.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError("ZeRO stage 3 is not supported: use stage 2, or FSDP with fsdp_version 2")


def adjust_fsdp(trainer: Trainer, evaluates: bool) -> None:
    """Sees to it that FSDP, if it is on, leaves the quantizer whole: it is small and frozen, and drawing sums up its
    codes in single precision.

    Raises:
        ValueError: a setting of FSDP does not go with models that draw.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is None:
        return
    if evaluates and plugin.fsdp_version == 1:
        raise ValueError(f"FSDP1 cannot draw masks to evaluate: set fsdp_version: 2, or give {WITHOUT_DRAWING}")
    if plugin.fsdp_version == 2 and plugin.cpu_ram_efficient_loading:
        raise ValueError("fsdp_cpu_ram_efficient_loading takes no model with parts that stay whole: set it to false")
    model = without_adapters(trainer.accelerator.unwrap_model(trainer.model))
    plugin.ignored_modules = [model.model.quantizer]


def save_whole(trainer: Trainer, folder: Path) -> None:
    """`trainer.save_model`, which under FSDP would write nothing where checkpoints are sharded. For all processes."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))


def save_adapter(trainer: Trainer, folder: Path) -> None:
    """The adapters alone. For all processes."""
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state)


def whole_adapted(trainer: Trainer, adapter: Path) -> PeftModel | None:
    """The trained model with its adapters in one piece, for the main process: of a model that FSDP has taken apart, its
    base loaded anew with the adapters that were saved in `adapter`."""
    if not trainer.is_world_process_zero():
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.is_fsdp_enabled:
        return model
    adapted = load_adapted(adapter, model.get_base_model().dtype)
    adapted.get_base_model().generation_config = model.get_base_model().generation_config
    return adapted
