"""Pictures while they are drawn: `for partial in model.stream(**inputs)` yields after every scale."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class PartialPicture:
    """The pictures that are being drawn, after one more scale.

    Attributes:
        scale: scales drawn so far, from 1 on.
        num_scales: scales that will be drawn.
        rows: (N,) rows of the batch that are drawing.
        codes: (N, tokens so far) codebook indices; `processor.decode_masks(partial.codes)` makes masks of them.
    """

    scale: int
    num_scales: int
    rows: torch.Tensor
    codes: torch.Tensor

    @property
    def complete(self) -> bool:
        return self.scale == self.num_scales


class _Stopped(Exception):
    """Nobody listens any more; ends `generate` in its thread."""


class PictureStreamer(BaseStreamer):
    """Hands every scale to `on_scale`. Text is passed on to `text_streamer`, if there is one.

    Pass it as `generate(streamer=...)` to be called back; `model.stream` is the same as an iterator.
    """

    def __init__(self, on_scale: Callable[[PartialPicture], None], text_streamer: BaseStreamer | None = None) -> None:
        self.on_scale, self.text_streamer = on_scale, text_streamer

    def put(self, value: torch.Tensor) -> None:
        if self.text_streamer is not None:
            self.text_streamer.put(value)

    def put_scale(self, partial: PartialPicture) -> None:
        self.on_scale(partial)

    def end(self) -> None:
        if self.text_streamer is not None:
            self.text_streamer.end()


class PictureStream:
    """What `model.stream` returns. Iterating runs `generate` in a thread; leaving the loop stops it.

    Attributes:
        outputs: what `generate` returned, once the loop has run to its end; None before.
    """

    def __init__(self, generate: Callable[..., Any], options: dict[str, Any], device_type: str) -> None:
        self._generate, self._options, self._device_type = generate, options, device_type
        self.outputs: Any = None

    def __iter__(self) -> Iterator[PartialPicture]:
        scales: queue.Queue[PartialPicture | BaseException | None] = queue.Queue()
        stopped, kind = threading.Event(), self._device_type
        # a thread has an autocast of its own
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

        def hand_over(partial: PartialPicture) -> None:
            if stopped.is_set():
                raise _Stopped
            scales.put(partial)

        def run() -> None:
            try:
                streamer = PictureStreamer(hand_over, self._options.get("streamer"))
                with autocast:
                    self.outputs = self._generate(**{**self._options, "streamer": streamer})
                scales.put(None)
            except _Stopped:
                pass
            except BaseException as error:  # raised again where the loop is
                scales.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (partial := scales.get()) is not None:
                if isinstance(partial, BaseException):
                    raise partial
                yield partial
        finally:
            stopped.set()
            thread.join()


__all__ = ["PartialPicture", "PictureStream", "PictureStreamer"]
