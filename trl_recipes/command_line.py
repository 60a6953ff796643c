"""What the commands have in common: how they say what is wrong with their input, and what a model may be called."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """A `ValueError`, which says what is wrong with the input, ends the command with one line instead of a traceback.

    For what happens before the work begins: an error in the midst of it is the program's, and its traceback is wanted.
    """
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def check_model_name(name: str) -> None:
    """Before transformers asks the Hub, again and again, for a folder that was mistyped.

    Raises:
        ValueError: no model in the folder, or no such folder and the name has not the form OWNER/NAME of the Hub.
    """
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise ValueError(f"the folder {name!r} holds no model: it has no config.json")
    elif not HUB_NAME.fullmatch(name):
        raise ValueError(f"no model folder {name!r}, and no name of the form OWNER/NAME on the Hub")
