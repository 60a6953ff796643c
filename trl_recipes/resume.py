"""Where a run that was killed goes on, and that one which is finished does not."""

import math
from pathlib import Path

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in a trainer's output folder, None without one.

    A run can be killed while it writes a checkpoint. `Trainer` writes `trainer_state.json` last, so a checkpoint
    without it was cut off; the one before it is used.
    """
    states = Path(folder).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")
    steps = {int(state.parent.name.removeprefix("checkpoint-")): state.parent for state in states}
    return str(steps[max(steps)]) if steps else None


def train_or_go_on(trainer: Trainer, checkpoint: str | None) -> None:
    """Trains, from a checkpoint if there is one. A run that has all its steps behind it only loads what it ends with:
    `Trainer` would take one more step, each time.

    Steps that are a share of the run (`--eval_steps 0.25`) are written out, as they stand in a checkpoint.
    """
    if checkpoint is None:
        trainer.train()
        return
    args = trainer.args
    steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    for name in ("logging_steps", "eval_steps", "save_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            setattr(args, name, math.ceil(steps * value))
    done = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    if done >= steps:
        if trainer.is_world_process_zero():
            print(f"the run is finished at step {done}: nothing is trained; to go on, raise its number of steps")
        args.max_steps, args.num_train_epochs = -1, 0
    trainer.train(resume_from_checkpoint=checkpoint)
