"""What the training commands ask of their options before anything is made or trained."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments


def refuse_many_processes(training: TrainingArguments) -> None:
    """For trainers that call more of the model than `forward`, which a wrapped model has not.

    Raises:
        ValueError: there are several processes, or one with several GPUs.
    """
    if training.world_size > 1 or training.n_gpu > 1:
        raise ValueError(
            "this command trains in one process, on one GPU: start it without accelerate launch, and with "
            "CUDA_VISIBLE_DEVICES=0 before it"
        )


def refuse_several_gpus(training: TrainingArguments) -> None:
    """For models that cannot be given parts of a batch, as one process with several GPUs would (`DataParallel`).

    Raises:
        ValueError: there is one process with several GPUs.
    """
    if training.n_gpu > 1:
        raise ValueError(
            f"this process sees {training.n_gpu} GPUs: start one for each, by accelerate launch --num_processes "
            f"{training.n_gpu} -m ... in place of python -m ..., or put CUDA_VISIBLE_DEVICES=0 before the command"
        )


def refuse(options: Any, names: Sequence[str], why: str) -> None:
    """For options (fields of a dataclass) that do not go with what a command does.

    Raises:
        ValueError: one of them is given, and not as it is anyway.
    """
    usual = {one.name: one.default for one in fields(options)}
    given = [f"--{name}" for name in names if getattr(options, name) != usual[name]]
    if given:
        raise ValueError(f"{', '.join(given)} {why}; leave it out")


def refuse_ignored(options: Any, names: Sequence[str], instead: str) -> None:
    """`refuse` for options that a command does not follow, because it has its own way."""
    refuse(options, names, f"would change nothing: {instead}")


def options_that_differ(recipe: Any, usual: Any, own: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Options that are given (other than in `usual`, a recipe of defaults), and not as what a run goes on from has them
    (`own`): name, what is asked for, and what it has."""
    for name, value in own.items():
        asked = getattr(recipe, name)
        if asked not in (value, getattr(usual, name)):
            yield name, asked, value


def check_numbers(recipe: Any, least: dict[str, int], shares: Sequence[str] = ()) -> None:
    """Options that are numbers, or None: `least` says how small each may be; `shares` lie between 0 and 1.

    Raises:
        ValueError: one of them is smaller, or no share.
    """
    for name, value in ((name, getattr(recipe, name)) for name in (*least, *shares)):
        if name in shares and not 0 <= value <= 1:
            raise ValueError(f"--{name} is a share, from 0 to 1, not {value}")
        if name in least and value is not None and value < least[name]:
            raise ValueError(f"--{name} {value} is too little: give {least[name]} or more")


def check_minutes(minutes: float | None) -> None:
    """Raises ValueError: no time at all."""
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes {minutes} is no time to train: give more than 0, or leave it out")
