"""Predictions on disk: one JSON object a line, one file a process, safe against a kill at any moment.

A line is `{"id": ..., "text": ..., "mask": COCO RLE or null, "score": ... or null}`. Each process appends to its own
file and forces every batch to the disk. A line that a kill cut short is left out when the files are read, and cut off
before its file is written to again; any number of processes may go on where others stopped.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

PATTERN = "predictions-*.jsonl"


class PredictionStore:
    """The predictions below a folder, by sample id. Only places are kept in memory, so that it stays small."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.duplicates = 0
        self._places: dict[str, tuple[Path, int]] = {}
        self._readers: dict[Path, IO[bytes]] = {}
        self._writer: IO[bytes] | None = None

    def read(self) -> "PredictionStore":
        """Looks through all files. Of two predictions for one sample the first counts (in the order of file names).

        Raises:
            ValueError: a line that is not the last of its file is no prediction.
        """
        self._places, self.duplicates = {}, 0
        for path in sorted(self.folder.glob(PATTERN)):
            with path.open("rb") as file:
                start = 0
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        break  # cut short by a kill
                    name = _parse(line, path, number)["id"]
                    self.duplicates += name in self._places
                    self._places.setdefault(name, (path, start))
                    start += len(line)
        return self

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> dict[str, Any]:
        path, start = self._places[name]
        if path not in self._readers:
            self._readers[path] = path.open("rb")
        self._readers[path].seek(start)
        return json.loads(self._readers[path].readline())

    def open_for(self, rank: int) -> None:
        """Makes the file of a process ready to append to, without a half line at its end."""
        path = self.folder / f"predictions-{rank:05d}.jsonl"
        self._writer = path.open("ab")
        whole = _whole_lines(path)
        if whole < self._writer.tell():
            self._writer.truncate(whole)

    def append(self, predictions: Sequence[dict[str, Any]]) -> None:
        """Writes predictions; when this returns they are on the disk."""
        if self._writer is None:
            raise ValueError("call open_for(rank) before append")
        lines = [json.dumps(one, ensure_ascii=False, separators=(",", ":")) for one in predictions]
        self._writer.write("".join(line + "\n" for line in lines).encode())
        self._writer.flush()
        os.fsync(self._writer.fileno())

    def close(self) -> None:
        for file in [*self._readers.values(), *([self._writer] if self._writer else [])]:
            file.close()
        self._readers, self._writer = {}, None


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if isinstance(found["id"], str):
            return found
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{path}:{number} is no prediction; delete the line, or start anew with --overwrite")


def _whole_lines(path: Path) -> int:
    """Length in bytes up to and with the last line break."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0
