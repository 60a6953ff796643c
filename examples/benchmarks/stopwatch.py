"""Where the time goes: hooks on the parts of a model, and the peak of memory."""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

PARTS = ("vision", "prefill", "text", "scales", "text head", "visual head", "decoder", "rest")


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Seconds that each part of a model takes, between `start` and `stop`.

    Passes of the language model are booked as "prefill" (the first), "text" (one position) or "scales" (more), or as
    `phase` says while it is set; the head by what it is for. "rest" is what no part accounts for.

    With `compiled` nothing inside a graph is timed: "prefill" and "scales" are then whole, and text is in "rest".
    """

    def __init__(self, case: Any, compiled: bool = False) -> None:
        self.device = case.model.device
        self.phase: str | None = None
        self.seconds: dict[str, float] = {}
        self._hooks: list[Any] = []
        vlm = case.model.model.vlm
        self._watch(vlm.vision_tower, lambda args, kwargs: "vision")
        self._watch(vlm.multi_modal_projector, lambda args, kwargs: "vision")
        if compiled:
            case.model._prefill = self._timed(case.model._prefill, "prefill")
            case.model._graphs = self._timed_graphs(case.model._graphs)
        else:
            head = lambda args, kwargs: "visual head" if self.phase == "scales" else "text head"  # noqa: E731
            self._watch(vlm.language_model, self._pass)
            self._watch(case.model.lm_head, head)
        self._watch(case.visual_tokenizer.decoder, lambda args, kwargs: "decoder")
        case.model.visual_logits = self._timed(case.model.visual_logits, "visual head")

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = now(self.device)
            result = call(*args, **kwargs)
            self._book(part, begin)
            return result

        return timed

    def _timed_graphs(self, graphs_of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda generation_config: self._timed(graphs_of(generation_config), "scales")

    def _pass(self, args: tuple, kwargs: dict) -> str:
        if self.phase is not None:
            return self.phase
        if "prefill" not in self.seconds:
            return "prefill"
        return "text" if kwargs["inputs_embeds"].shape[1] == 1 else "scales"

    def _watch(self, module: torch.nn.Module, name: Callable[[tuple, dict], str]) -> None:
        began: list[tuple[str, float]] = []

        def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            began.append((name(args, kwargs), now(self.device)))

        def after(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self._book(*began.pop())

        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(after, with_kwargs=True))

    def _book(self, part: str, begin: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + now(self.device) - begin

    def time(self, run: Callable[[], Any]) -> dict[str, float]:
        """Seconds of each of PARTS, and "total", of one run."""
        self.seconds = {}
        begin = now(self.device)
        run()
        total = now(self.device) - begin
        parts = {part: self.seconds.get(part, 0.0) for part in PARTS}
        return parts | {"rest": total - sum(parts.values()), "total": total}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Fills a list with the most memory (MB) that was in use: of the GPU, or resident memory of this process."""
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        gc.collect()
        with suppress(OSError, AttributeError):  # glibc: gives back what was freed, or others' garbage would count
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # Linux: begins a new peak; elsewhere it is the peak since the process began
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    yield found
    if device.type == "cuda":
        found.append(torch.cuda.max_memory_allocated(device) / 2**20)
        return
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        found.append(int(line.split()[1]) / 1024)
    else:
        import resource  # not on Windows

        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
