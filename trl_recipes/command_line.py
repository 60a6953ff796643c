"""What the commands have in common: how they say what is wrong with their input, and how a model is named."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
OURS = ("modeling_argenseg", "processing", "trl_recipes")


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """A `ValueError` of this project's, which says what is wrong with the input, or an `ImportError` (see `needing`)
    ends the command with one line instead of a traceback. Those that come from deeper keep it: they say little
    without. Output that goes to a file in an encoding without some character shows its number instead."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (ValueError, ImportError) as error:
        if raised_by(error.__traceback__) not in OURS:
            raise
        raise SystemExit(f"error: {error}") from error


def raised_by(traceback: TracebackType | None) -> str:
    """The top-level package whose code raised."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    names = traceback.tb_frame.f_globals
    spec = names.get("__spec__")  # under `python -m` the module's own name stands here alone
    return (spec.name if spec is not None else names.get("__name__", "")).partition(".")[0]


@contextmanager
def needing(extra: str, name: str) -> Iterator[None]:
    """For imports of what an extra of this package brings. `name`: `__name__` of the module that needs it, which ends
    with one line if it is the command itself.

    Raises:
        ImportError: it is not installed, or too old, with the way to install it.
    """
    try:
        yield
    except ImportError as error:
        message = f"{error}: pip install 'argenseg[{extra}]'"
        raise (SystemExit(f"error: {message}") if name == "__main__" else ImportError(message)) from error


@contextmanager
def loading(name: str) -> Iterator[None]:
    """For calls of `from_pretrained`. A mistyped folder is not asked for on the Hub, again and again.

    Raises:
        ValueError: there is no such folder, and the name has not the form OWNER/NAME of the Hub, or there is a folder
            OWNER; or what is there cannot be read.
    """
    if not Path(name).is_dir() and (not HUB_NAME.fullmatch(name) or Path(name).parent.is_dir()):
        raise ValueError(f"no model folder {name!r}, and no name of the form OWNER/NAME on the Hub")
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name!r}: {' '.join(str(error).split())}") from error
