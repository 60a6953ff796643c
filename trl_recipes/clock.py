"""Runs that end by steps or by time: `--minutes`."""

import time

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Ends a run in time. Schedules ask it how much of the run is over, by steps or by time, whichever is further.

    Args:
        minutes: from the first step of this program, so that a run that goes on after a stop has them anew. None for
            all steps.
    """

    def __init__(self, minutes: float | None) -> None:
        self.seconds = None if minutes is None else 60 * minutes
        self.begin = time.monotonic()
        self._told: tuple[int, float] = (-1, 0.0)

    def progress(self, step: int, steps: int) -> float:
        """0 to 1; the same whenever it is asked in one step."""
        if self._told[0] != step:
            over = step / max(steps, 1)
            if self.seconds is not None:
                over = max(over, (time.monotonic() - self.begin) / self.seconds)
            self._told = (step, min(over, 1.0))
        return self._told[1]

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.monotonic()
        self._told = (-1, 0.0)

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress(state.global_step, state.max_steps) >= 1.0:
            control.should_training_stop = True
