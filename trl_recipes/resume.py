"""Where a run that was killed goes on, and that one which is finished does not."""

import json
import math
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .training_options import refuse

TORCH_FILES = (".pt", ".pth", ".bin")
OPTIMIZER = ("optimizer", "global_step")  # files or folders of Trainer and FSDP, and of DeepSpeed


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in a trainer's output folder, None without one.

    A run can be killed while it writes a checkpoint, a disk be full, or the power fail before all is on it: of a broken
    checkpoint the one before is used.
    """
    return next((str(path) for path in _newest_first(folder) if flaw_of(path) is None), None)


def _newest_first(folder: str | Path) -> list[Path]:
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*")}
    numbered = [path for path, step in steps.items() if step.isdecimal()]
    return sorted(numbered, key=lambda path: int(steps[path]), reverse=True)


def flaw_of(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is missing or cut off, None if it is whole. Its large files are not read: what a
    cut takes away is the end, where a zip archive (torch's files) has its table, and safetensors check their size."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())  # `Trainer` writes it last
    except FileNotFoundError:
        return f"without {TRAINER_STATE_NAME}"
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut off"
    if not any(path.name.startswith(OPTIMIZER) for path in checkpoint.iterdir()):
        return "without its optimizer, as --save_only_model leaves it"
    cut = (path.name for path in sorted(checkpoint.iterdir()) if _is_cut_off(path))
    return next((f"{name} is cut off" for name in cut), None)


def _is_cut_off(path: Path) -> bool:
    if path.suffix in TORCH_FILES:
        return not zipfile.is_zipfile(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return False
        except SafetensorError:
            return True
    return False


def where_to_go_on(training: TrainingArguments) -> str | None:
    """The checkpoint that a run goes on from: that of `--resume_from_checkpoint`, or the last whole one of its output
    folder; None where it begins. Asked before a run is prepared, it spares the wait for an error.

    Raises:
        ValueError: what is named is no checkpoint, or a broken one, or none is going to be written.
    """
    refuse(training, ("save_only_model",), "leaves no checkpoints to go on from (--save_total_limit 1 keeps only one)")
    named = training.resume_from_checkpoint
    if named is None:
        return last_checkpoint(training.output_dir or ".")
    flaw = flaw_of(Path(named))
    if flaw is not None:
        raise ValueError(f"{named} is no whole checkpoint ({flaw}): go on from another one")
    return named


def _tell_of_broken(output: Path, used: str | None) -> None:
    for path in _newest_first(output):
        if str(path) == used:
            return
        if (flaw := flaw_of(path)) is not None:
            instead = "begins anew" if used is None else f"goes on from {used}"
            print(f"{path} is broken ({flaw}) and passed over: the run {instead}")


def find_best(state: TrainerState, checkpoint: Path, output: Path) -> None:
    """Makes a checkpoint say where the best one is now: it was written down as seen from where the run began."""
    if state.best_model_checkpoint is None:
        return
    best = output / Path(state.best_model_checkpoint).name
    if best.is_dir() and str(best) != state.best_model_checkpoint:
        state.best_model_checkpoint = str(best)
        part = checkpoint / f"{TRAINER_STATE_NAME}.part"
        state.save_to_json(str(part))
        part.replace(checkpoint / TRAINER_STATE_NAME)  # whole or not at all


def train_or_go_on(trainer: Trainer) -> None:
    """Trains, from a checkpoint if there is one. A run that has all its steps behind it only loads what it ends with:
    `Trainer` would take one more step, each time.

    Steps that are a share of the run (`--eval_steps 0.25`) are written out, as they stand in a checkpoint. Broken
    checkpoints after the one that is used are told.
    """
    checkpoint = where_to_go_on(trainer.args)
    if trainer.is_world_process_zero() and trainer.args.resume_from_checkpoint is None:
        _tell_of_broken(Path(trainer.args.output_dir), checkpoint)
    if checkpoint is None:
        trainer.train()
        return
    args = trainer.args
    steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    for name in ("logging_steps", "eval_steps", "save_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            setattr(args, name, math.ceil(steps * value))
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    with args.main_process_first(local=False):
        if trainer.is_world_process_zero():
            find_best(state, Path(checkpoint), Path(args.output_dir))
    if state.global_step >= steps:
        if trainer.is_world_process_zero():
            print(f"the run is finished at step {state.global_step}: nothing is trained; to go on, raise its steps")
        args.max_steps, args.num_train_epochs = -1, 0
    trainer.train(resume_from_checkpoint=checkpoint)
