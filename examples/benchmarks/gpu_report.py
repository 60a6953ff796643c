"""What the GPU benchmark reports as it goes, and how it takes times."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import cases
from .stopwatch import now

PARTS = ("vision", "prefill", "drawing", "decoder")


class Report:
    """Figures, printed and written to a file as soon as they are known; and the time that is left.

    Args:
        path: a JSON file, or none.
        seconds: that there are, from `start` on, a moment of `time.perf_counter`; default: now.
    """

    def __init__(self, path: Path | None, seconds: float, start: float | None = None) -> None:
        self.path, self.start = path, time.perf_counter() if start is None else start
        self.end = self.start + seconds
        self.figures: dict[str, Any] = {}

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def add(self, name: str, value: Any) -> None:
        self.figures[name] = value
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"[{time.perf_counter() - self.start:5.1f} s] {name}: {shown}", flush=True)
        self.write()

    def table(self, name: str, rows: list[list[Any]]) -> None:
        self.figures[name] = rows
        cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        lines.insert(1, "|---" * len(rows[0]) + "|")
        print("\n".join(["", name, *lines, ""]), flush=True)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            new = self.path.with_name(self.path.name + ".new")
            new.write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")
            new.replace(self.path)  # whole at any time

    def step(self, name: str, seconds: float, run: Callable[[], None]) -> None:
        """Runs one step if that many seconds are left for it."""
        if self.left < seconds:
            self.add(f"skipped: {name}", f"{self.left:.0f} s left, {seconds:.0f} needed")
            return
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            self.add(f"failed: {name}", f"{type(error).__name__}: {error}")


class Parts:
    """Seconds that each part of a run takes, waiting for the device at its begin and end; without those inside it."""

    def __init__(self, case: cases.Case) -> None:
        self.case, self.seconds = case, dict.fromkeys(PARTS, 0.0)
        self._inside = [0.0]

    @contextmanager
    def watching(self) -> Iterator[None]:
        net, tokenizer = self.case.model, self.case.visual_tokenizer
        places = [(net.model, "get_image_features"), (net, "_prefill"), (net, "_draw"), (tokenizer, "decode")]
        for (owner, name), part in zip(places, PARTS, strict=True):
            setattr(owner, name, self._timed(getattr(owner, name), part))
        try:
            yield
        finally:
            for owner, name in places:
                delattr(owner, name)

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = now(self.case.model.device)
            self._inside.append(0.0)
            result = call(*args, **kwargs)
            taken = now(self.case.model.device) - begin
            self.seconds[part] += taken - self._inside.pop()
            self._inside[-1] += taken
            return result

        return timed


def times(run: Callable[[], Any], device: torch.device, count: int, warm: int = 1) -> list[float]:
    """Milliseconds of each of `count` runs, after some to warm up."""
    found = []
    for number in range(warm + count):
        begin = now(device)
        run()
        if number >= warm:
            found.append(1000 * (now(device) - begin))
    return found
