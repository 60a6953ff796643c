"""Passes over a static cache, recorded once as CUDA graphs and played: fixed places for caches and inputs.

What `static_steps` records: a `GraphCache` holds the contents of one cache at a time, a `Recording` is a function of
tensors that reads and writes fixed addresses, and two context managers change what a model's layers do meanwhile.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, StaticLayer

from .cache_name import CACHE


class GraphCacheLayer(StaticLayer):
    """A layer of a `GraphCache`: told where to write, it does not count, and shows no more columns than are needed."""

    _layer_type = None  # not one that transformers should make of a configuration

    def __init__(self, layer: StaticLayer) -> None:
        super().__init__(layer.max_cache_len)
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.device, True
        self.keys, self.values = torch.empty_like(layer.keys), torch.empty_like(layer.values)
        self.cumulative_length = torch.zeros_like(layer.cumulative_length)
        self.places: torch.Tensor | None = None
        self.limit = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.places, key_states)
        self.values.index_copy_(2, self.places, value_states)
        return self.keys[:, :, : self.limit], self.values[:, :, : self.limit]


class GraphCache:
    """Storage for the contents of one static cache at a time, at addresses that do not change.

    Attributes: `cache`, a cache over that storage; `graphs`, what has been recorded over it, by (scale, length,
    columns looked at); `recorded_state`, the addresses of the weights, and the adapters, in these recordings; `scale`,
    of the last pass.
    """

    def __init__(self, cache: Cache) -> None:
        self.graphs: dict[tuple[int, int, int], Recording | None] = {}
        self.recorded_state: list[Any] = []
        self.scale: float = float("inf")  # whatever comes first begins a picture
        self._owner: Callable[[], Cache | None] = lambda: None
        with torch.inference_mode(False):
            self.cache = Cache(layers=[GraphCacheLayer(layer) for layer in cache.layers])

    def fits(self, cache: Cache) -> bool:
        own, other = _storage(self.cache), _storage(cache)
        return len(own) == len(other) and all(
            a.shape == b.shape and a.dtype == b.dtype and a.device == b.device for a, b in zip(own, other, strict=True)
        )

    def adopt(self, cache: Cache) -> None:
        """Copies the contents of a cache to this storage, and points the cache at it. The cache that owned the storage
        before gets a copy of its own."""
        if cache.layers[0].keys is self.cache.layers[0].keys:
            return
        before = self._owner()
        if before is not None and before.layers[0].keys is self.cache.layers[0].keys:
            _point_at(before, [tensor.clone() for tensor in _storage(before)])
        own = _storage(self.cache)
        with torch.no_grad():
            for kind in range(3):  # all of one type
                torch._foreach_copy_(own[kind::3], _storage(cache)[kind::3])
        _point_at(cache, own)
        self._owner = weakref.ref(cache)

    def places(self, count: int) -> torch.Tensor:
        """Where the next columns are written (count,)."""
        held = self.cache.layers[0].cumulative_length
        return torch.arange(count, device=held.device) + held

    def add(self, count: int) -> None:
        """So many columns have been written."""
        with torch.no_grad():
            torch._foreach_add_([layer.cumulative_length for layer in self.cache.layers], count)


def write_to(cache: Cache, places: torch.Tensor, limit: int) -> None:
    """Passes over the cache of a `GraphCache` write there from now on, and look at the first `limit` columns."""
    for layer in cache.layers:
        layer.places, layer.limit = places, limit


def _storage(cache: Cache) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]


def _point_at(cache: Cache, storage: list[torch.Tensor]) -> None:
    for index, layer in enumerate(cache.layers):
        layer.keys, layer.values, layer.cumulative_length = storage[3 * index : 3 * index + 3]


class Recording:
    """A function of tensors that has been recorded once: its inputs are copied to where it reads, and it is played.

    Args:
        run: the function, of named tensors; to do it twice must be the same as once.
        tensors: inputs of the shapes that it will always have.
        record: as `record_cuda_graph`.
    """

    def __init__(
        self, run: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], record: Callable | None = None
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():  # to be written to inside and outside of inference mode
            self.tensors = fixed = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
                for name, tensor in tensors.items()
            }
            device = next(iter(tensors.values())).device
            self._play = (record or record_cuda_graph)(lambda: run(**fixed), device)

    def __call__(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.tensors[name].copy_(tensor)
            return self._play().clone()  # the next result comes to the same place


_graphs: "weakref.WeakKeyDictionary[Any, torch.device]" = weakref.WeakKeyDictionary()  # all that are alive
_streams: dict[torch.device, Any] = {}


def record_cuda_graph(run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """Records a function without arguments. Returns what plays it, and has its result at the same place every time.

    It runs once before, so that libraries allocate and load what they need. All graphs of a device share their memory
    for intermediate results; so two must not run at the same time.
    """
    if device.type != "cuda":
        run()  # what cannot be done fails now
        return run
    with torch.cuda.device(device):
        stream = _streams.setdefault(device, torch.cuda.Stream())
        current = torch.cuda.current_stream()
        # memory may be shared with a graph that is alive only
        pool = next((other.pool() for other, place in _graphs.items() if place == device), None)
        graph = torch.cuda.CUDAGraph()
        try:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = run()
        finally:
            torch.cuda.set_stream(current)  # torch does not when the end of a recording fails
            current.wait_stream(stream)
    _graphs[graph] = device

    def play() -> torch.Tensor:
        graph.replay()
        return result

    return play


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """While inside, the RMS norms of a model that are computed as Llama's are torch's own."""
    norms = [module for module in model.modules() if _is_plain_norm(module)]
    for norm in norms:
        norm.forward = _fused(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _is_plain_norm(module: nn.Module) -> bool:
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return named and isinstance(getattr(module, "weight", None), torch.Tensor) and "forward" not in vars(module)


def _fused(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda hidden: norm.weight * F.rms_norm(hidden, hidden.shape[-1:], eps=norm.variance_epsilon)


@contextmanager
def layers_through(step: Callable, model: nn.Module) -> Iterator[None]:
    """While inside, the decoder layers of a model are called as `step(layer, *args, **kwargs)`.

    The cache that it gets is then the layer's own part of it, so that a compiled step is the same for all layers.

    Raises:
        ValueError: the model has no `layers`, they do not count as their cache does, or someone else calls them.
        TypeError: when called, the cache is not passed by its name.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError("the model has no list of layers")
    for index, layer in enumerate(layers):
        if {getattr(module, "layer_idx", index) for module in layer.modules()} != {index}:
            raise ValueError(f"layer {index} writes to another part of the cache")
        if "forward" in vars(layer):
            raise ValueError(f"the forward pass of layer {index} has been replaced")
    for index, layer in enumerate(layers):
        layer.forward = _through(step, layer, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _through(step: Callable, layer: nn.Module, index: int) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if not isinstance(cache, Cache):
            raise TypeError(f"decoder layers do not get their cache as {CACHE}")
        return step(layer, *args, **kwargs | {CACHE: OneLayer(cache.layers[index])})

    return forward


class OneLayer:
    """A layer of a cache, called as the whole cache is; which one it is does not matter to a compiled graph."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values (R, heads, l, width); returns all that is looked at, (R, heads, limit, width)."""
        # whoever looks at the number of the layer makes it a constant of the graph
        return self.layer.update(key_states, value_states)


__all__ = ["GraphCache", "Recording", "fused_norms", "layers_through", "record_cuda_graph", "write_to"]
