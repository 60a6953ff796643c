"""Steps of static shape: a static cache with room for pictures, and one compiled graph for each scale.

With `cache_implementation="static"` every pass of the language model has the same shapes from picture to picture. On a
GPU transformers then compiles by itself; so does each scale here, under the same conditions and with the same
`compile_config`, whose default, "reduce-overhead", makes CUDA graphs.

Inductor takes minutes for the graphs of a large model. `CompileConfig(backend="cudagraphs")` compiles nothing: each
scale is recorded as it is the first time it is drawn, which takes a fraction of a second, and played back afterwards.
With `options={"fused_norms": True}` torch's own RMS norm, one kernel instead of six, takes the place of the model's in
recordings. It sums up in another order, which moves no id in fp32 but may where two logits are the same in bf16.

With `options={"compiled_layers": True}` inductor makes few kernels of a decoder layer's many, and these are recorded.
One graph is compiled for each shape and serves all layers: their weights and caches are its inputs. Inductor is told to
round where the layer does; sums inside of a norm may be in another order, as above. A model whose layers cannot be
compiled is recorded without, after a warning.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CompileConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer

ROOM = 128  # columns; static caches are sized in multiples of it, so that prompts of like length share their graphs
HOMES = 4  # shapes of caches whose recorded graphs are kept


def rounded_up(length: int) -> int:
    return -(-length // ROOM) * ROOM


def with_room(cache: Cache, config: Any, used: int, needed: int) -> Cache:
    """A cache that takes `needed` columns: the same, or a larger static one that holds what the first `used` held.

    Raises:
        ValueError: a static cache with sliding layers is too small.
    """
    if not isinstance(cache, StaticCache) or cache.layers[0].get_max_length() >= needed:
        return cache
    if any(layer.is_sliding for layer in cache.layers):
        raise ValueError(f"the static cache is too small for what is drawn: pass max_cache_len={rounded_up(needed)}")
    larger = StaticCache(config=config, max_cache_len=rounded_up(needed))
    for index, layer in enumerate(cache.layers):
        larger.update(layer.keys[:, :, :used], layer.values[:, :, :used], index)
    return larger


class ScaleGraphs:
    """The language model's pass of each scale, compiled by itself: one graph a scale, whatever was drawn before.

    One compiled function for all would recompile at every new length, and more often than torch allows for one
    function. Attributes: `calls`, the compiled function of each (scale, length).
    """

    def __init__(self, language_model: PreTrainedModel, config: CompileConfig | None) -> None:
        self.language_model = language_model
        self.config = config or CompileConfig()
        self.calls: dict[tuple[int, ...], Callable] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"calls": {}}  # a copy of the model compiles its own

    def __call__(self, scale: int, columns: int, **inputs: Any) -> torch.Tensor:
        """Hidden states (R, l, hidden) of the queries of one scale; with them the cache holds so many columns."""
        key = scale, inputs["inputs_embeds"].shape[1]
        if key not in self.calls:
            options = self.config.to_dict() | {"dynamic": False}
            self.calls[key] = torch.compile(_own_function(self.language_model), **options)
        torch.compiler.cudagraph_mark_step_begin()
        # a CUDA graph writes its next result to the same place
        return self.calls[key](**inputs).clone()


def _own_function(language_model: PreTrainedModel) -> Callable:
    def step(**inputs: Any) -> torch.Tensor:
        return language_model(**inputs).last_hidden_state

    step.__code__ = step.__code__.replace()  # graphs are counted, and limited, by code object
    return step


def _own_layer() -> Callable:
    def step(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(layer).forward(layer, *args, **kwargs)

    step.__code__ = step.__code__.replace()  # one for each shape, as for whole passes
    return step


def compile_as_eager(function: Callable) -> Callable:
    """A function compiled by inductor for static shapes; calls raise where its graph would break.

    In bf16 the kernels round where the function does, and no product with a weight takes another form (a bias added
    afterwards, a padded shape). On a CPU torch 2.11 does not round so.
    """
    options = {"emulate_precision_casts": True, "pattern_matcher": False}
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


def records(config: CompileConfig | None) -> bool:
    """Whether passes are recorded as CUDA graphs instead of compiled."""
    return config is not None and config.backend == "cudagraphs"


class RecordedScales(ScaleGraphs):
    """The language model's pass of each scale, recorded as a CUDA graph: the same kernels, without Python in between.

    A CUDA graph reads and writes fixed addresses. So there is a `Home` for each shape of cache, and a cache moves in
    before its first scale. What cannot be recorded runs as usual, after a warning. Elsewhere than on a CUDA device
    nothing is recorded, and the pass is run again on the same fixed tensors. Weights that were put elsewhere are
    noticed; adapters that are switched off are not (`model._scale_graphs = None` forgets all recordings).

    Attributes: `homes`, the latest first; `record`, which makes a graph of a function without arguments; `compile`,
    which compiles a function; `calls`, the compiled decoder layer of each (rows, length, columns looked at, columns of
    the cache); `compiles`, whether layers are compiled: wanted, and never failed.
    """

    def __init__(self, language_model: PreTrainedModel, config: CompileConfig | None) -> None:
        super().__init__(language_model, config)
        self.homes: list[Home] = []
        self.record: Callable = record_cuda_graph
        self.compile: Callable = compile_as_eager
        self.compiles = bool((self.config.options or {}).get("compiled_layers"))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"homes": []}

    def __call__(self, scale: int, columns: int, **inputs: Any) -> torch.Tensor:
        cache, mask, embeds = inputs["past_key_values"], inputs["attention_mask"], inputs["inputs_embeds"]
        if mask is None or mask.ndim != 4 or any(type(layer) is not StaticLayer for layer in cache.layers):
            _warn("flash attention and sliding layers cannot be recorded")
            return self.language_model(**inputs).last_hidden_state
        if mask.dtype == torch.bool:  # attention would do so in every layer
            zeros = torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device)
            inputs["attention_mask"] = mask = zeros.masked_fill_(~mask, -torch.inf)
        home = self._home(cache)
        home.take_in(cache)
        if scale <= home.scale:  # a new picture; between its scales nothing changes
            weights = [weight.data_ptr() for weight in self.language_model.parameters()]
            if home.weights != weights:
                home.graphs, home.weights = {}, weights
        home.scale = scale
        limit = min(rounded_up(columns), mask.shape[-1])
        tensors = {
            "inputs_embeds": embeds,
            "attention_mask": mask[..., :limit],
            "position_ids": inputs["position_ids"],
            "places": home.places(embeds.shape[1]),
        }
        key = scale, embeds.shape[1], limit
        if key not in home.graphs:
            home.graphs[key] = self._recorded(home, limit, tensors)
        graph = home.graphs[key]
        if graph is None:
            return self.language_model(**inputs).last_hidden_state
        hidden = graph(tensors)
        home.add(embeds.shape[1])
        return hidden

    def _home(self, cache: Cache) -> "Home":
        home = next((home for home in self.homes if home.fits(cache)), None)
        if home is None:
            home = Home(cache)
        else:
            self.homes.remove(home)
        self.homes = [home, *self.homes][:HOMES]
        return home

    def _recorded(self, home: "Home", limit: int, tensors: dict[str, torch.Tensor]) -> "Recording | None":
        """None if it cannot be done."""
        fused = bool((self.config.options or {}).get("fused_norms"))
        language_model, cache = self.language_model, home.cache

        def run(step: Callable | None, places: torch.Tensor, **fixed: torch.Tensor) -> torch.Tensor:
            write_to(cache, places, limit)
            with (
                torch.inference_mode(False),  # compiled functions are of one mode
                torch.no_grad(),
                fused_norms(language_model) if fused else nullcontext(),
                layers_through(step, language_model) if step else nullcontext(),
            ):
                return language_model(**fixed, past_key_values=cache, use_cache=True).last_hidden_state

        if self.compiles:
            try:
                return Recording(partial(run, self._step(cache, limit, tensors)), tensors, self.record)
            except Exception as error:  # of the compiler, or of a layer that is not like others
                _warn(f"layers could not be compiled to be recorded ({type(error).__name__}: {error})")
                self.compiles = False
        try:
            return Recording(partial(run, None), tensors, self.record)
        except Exception as error:  # of the driver, of the allocator, of a model that reads values on the host
            _warn(f"a scale could not be recorded as a CUDA graph ({type(error).__name__}: {error})")
            return None

    def _step(self, cache: Cache, limit: int, tensors: dict[str, torch.Tensor]) -> Callable:
        """One decoder layer, compiled for these shapes."""
        key = *tensors["inputs_embeds"].shape[:2], limit, cache.layers[0].keys.shape[2]
        if key not in self.calls:
            self.calls[key] = self.compile(_own_layer())
        return self.calls[key]


class HomeLayer(StaticLayer):
    """A layer of a `Home`: told where to write, it does not count, and shows no more columns than need be looked at."""

    _layer_type = None  # not one that transformers should make of a configuration

    def __init__(self, layer: StaticLayer) -> None:
        super().__init__(layer.max_cache_len)
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
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


class Home:
    """Storage for the contents of one static cache at a time, at addresses that do not change.

    Attributes: `cache`, a cache over that storage; `graphs`, what has been recorded over it, by (scale, length,
    columns looked at); `weights`, the addresses of the weights in these recordings; `scale`, of the last pass.
    """

    def __init__(self, cache: Cache) -> None:
        self.graphs: dict[tuple[int, int, int], Recording | None] = {}
        self.weights: list[int] = []
        self.scale: float = float("inf")  # whatever comes first begins a picture
        self._tenant: Callable[[], Cache | None] = lambda: None
        with torch.inference_mode(False):
            self.cache = Cache(layers=[HomeLayer(layer) for layer in cache.layers])

    def fits(self, cache: Cache) -> bool:
        own, other = _storage(self.cache), _storage(cache)
        return len(own) == len(other) and all(
            a.shape == b.shape and a.dtype == b.dtype and a.device == b.device for a, b in zip(own, other, strict=True)
        )

    def take_in(self, cache: Cache) -> None:
        """Moves a cache in: it keeps what it holds, and holds it here. Who lived here takes a copy along."""
        if cache.layers[0].keys is self.cache.layers[0].keys:
            return
        before = self._tenant()
        if before is not None and before.layers[0].keys is self.cache.layers[0].keys:
            _settle(before, [tensor.clone() for tensor in _storage(before)])
        own = _storage(self.cache)
        with torch.no_grad():
            for kind in range(3):  # all of one type
                torch._foreach_copy_(own[kind::3], _storage(cache)[kind::3])
        _settle(cache, own)
        self._tenant = weakref.ref(cache)

    def places(self, count: int) -> torch.Tensor:
        """Where the next columns are written (count,)."""
        held = self.cache.layers[0].cumulative_length
        return torch.arange(count, device=held.device) + held

    def add(self, count: int) -> None:
        """So many columns have been written."""
        with torch.no_grad():
            torch._foreach_add_([layer.cumulative_length for layer in self.cache.layers], count)


def write_to(cache: Cache, places: torch.Tensor, limit: int) -> None:
    """Passes over the cache of a `Home` write there from now on, and look at the first `limit` columns."""
    for layer in cache.layers:
        layer.places, layer.limit = places, limit


def _storage(cache: Cache) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]


def _settle(cache: Cache, storage: list[torch.Tensor]) -> None:
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

    `past_key_values` is then the layer's own part of the cache, so that a compiled step is the same for all layers.

    Raises:
        ValueError: the model has no `layers`, they do not count as their cache does, or someone else calls them.
        TypeError: when called, the cache is not passed as `past_key_values`.
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
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, Cache):
            raise TypeError("decoder layers do not get their cache as past_key_values")
        return step(layer, *args, **kwargs | {"past_key_values": OneLayer(cache.layers[index])})

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


def _warn(what: str) -> None:
    warnings.warn(f"{what}: it runs without, which is slower and gives the same", stacklevel=3)


def scale_graphs(language_model: PreTrainedModel, config: CompileConfig | None) -> ScaleGraphs:
    return (RecordedScales if records(config) else ScaleGraphs)(language_model, config)


__all__ = ["RecordedScales", "ScaleGraphs", "records", "rounded_up", "scale_graphs", "with_room"]
