"""Pickles of strangers, read without running anything: only plain containers, numbers and text come out."""

import pickle
from pathlib import Path
from typing import Any

CONTAINERS = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,  # written by Python 2
    ("__builtin__", "frozenset"): frozenset,
}


class PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows no class and no function but `set` and `frozenset`, so that nothing can be called."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return CONTAINERS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, and only dicts, lists, tuples, sets, numbers and text are let in"
            ) from None


def load_plain_pickle(path: str | Path) -> Any:
    """What a pickle of plain containers holds; byte strings of Python 2 are read as UTF-8.

    Raises:
        ValueError: the file is no pickle, or one that holds or calls anything else.
    """
    with open(path, "rb") as file:
        try:
            return PlainUnpickler(file, encoding="utf-8", errors="replace").load()
        except Exception as error:  # a broken pickle raises whatever its bytes happen to mean
            raise ValueError(f"{path} is not a pickle of plain data: {error}") from error
