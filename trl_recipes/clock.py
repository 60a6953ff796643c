"""Runs that end by steps or by time: `--minutes`."""

import time

import torch
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Ends a run in time. Schedules ask it how much of the run is over, by steps or by time, whichever is further.

    Args:
        minutes: from the first step of this program, so that a run that goes on after a stop has them anew. None for
            all steps.

    Attributes:
        share: what `progress` told last, in memory that data loaders' processes share.
    """

    def __init__(self, minutes: float | None) -> None:
        self.seconds = None if minutes is None else 60 * minutes
        self.begin = time.monotonic()
        self.share = torch.zeros((), dtype=torch.float64).share_memory_()
        self._told = -1

    def progress(self, step: int, steps: int) -> float:
        """0 to 1; the same whenever it is asked in one step."""
        if self._told != step:
            over = step / max(steps, 1)
            if self.seconds is not None:
                over = max(over, (time.monotonic() - self.begin) / self.seconds)
            self._told = step
            self.share.fill_(min(over, 1.0))
        return self.share.item()

    def place(self, step: int, steps: int) -> float:
        """Where a step stands between 0 and `steps`: at itself, or further on where time runs out."""
        return step if self.seconds is None else steps * self.progress(step, steps)

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.monotonic()
        self._told = -1
        self.share.zero_()

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress(state.global_step, state.max_steps) >= 1.0:
            control.should_training_stop = True
