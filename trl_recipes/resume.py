"""Where a run that was killed goes on."""

from pathlib import Path


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in a trainer's output folder, None without one.

    A run can be killed while it writes a checkpoint. `Trainer` writes `trainer_state.json` last, so a checkpoint
    without it was cut off; the one before it is used.
    """
    states = Path(folder).glob("checkpoint-*/trainer_state.json")
    steps = {int(state.parent.name.removeprefix("checkpoint-")): state.parent for state in states}
    return str(steps[max(steps)]) if steps else None
