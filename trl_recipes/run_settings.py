"""What the result of a run on one's own masks depends on: other data or options never go on with the same output."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from .mask_data.tokenising import content_hash
from .resume import last_checkpoint
from .settings_files import check_settings, fingerprint, write_settings

SETTINGS = "run.json"
RESULTS = (SETTINGS, "checkpoint-*", "metrics.jsonl", "drawn-*.png", "learning_curve.png")  # of any run
TRAINING_SETTINGS = (
    "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"
)  # fmt: skip


def run_settings(training: TrainingArguments, model: nn.Module, rows: Dataset, validation: Dataset) -> dict[str, Any]:
    """Data, first weights and options of training; a run may take more steps than it began with."""
    plain = training.to_dict()
    return {
        "training_samples": len(rows),
        "training_data": content_hash(rows),
        "validation_samples": len(validation),
        "validation_data": content_hash(validation),
        "weights": fingerprint(model),
        "batch_size": training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
        **{name: plain[name] for name in TRAINING_SETTINGS},
        "precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
    }


def start_run(
    output: Path, settings: dict[str, Any], model: str, overwrite: bool = False, results: tuple[str, ...] = ()
) -> None:
    """Writes the settings of a new run, or makes sure that one that goes on has those that it began with.

    Args:
        model: the folder or Hub name that the run begins with.
        overwrite: begin anew, and delete what an earlier run left: `RESULTS` and `results`, patterns of file names.

    Raises:
        ValueError: a setting differs, or what would be deleted belongs to the model itself.
    """
    state = PartialState()
    earlier = [path for pattern in (*RESULTS, *results) for path in output.glob(pattern)] if overwrite else []
    needed = next((path for path in earlier if path.resolve().is_relative_to(Path(model).resolve())), None)
    if needed is not None:
        raise ValueError(f"--overwrite would delete {needed} of the model to begin with: give another output")
    if state.is_main_process:
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if last_checkpoint(output) is None:
            (output / SETTINGS).unlink(missing_ok=True)
        elif not (output / SETTINGS).is_file():
            print(f"{output} was begun by an earlier version: whether data and options are the same is not known")
        write_settings(output / SETTINGS, settings)
    state.wait_for_everyone()
    check_settings(output / SETTINGS, settings)
