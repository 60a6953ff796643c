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
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from .cache_name import CACHE
from .recordings import GraphCache, Recording, fused_norms, layers_through, record_cuda_graph, write_to

ROOM = 128  # columns; static caches are sized in multiples of it, so that prompts of like length share their graphs
GRAPH_CACHES = 4  # shapes of caches whose recorded graphs are kept


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
            self.calls[key] = torch.compile(_whole_pass(self.language_model), **options)
        torch.compiler.cudagraph_mark_step_begin()
        # a CUDA graph writes its next result to the same place
        return self.calls[key](**inputs).clone()


def _own(step: Callable) -> Callable:
    step.__code__ = step.__code__.replace()  # dynamo limits recompiling by code object: a copy for each shape
    return step


def _whole_pass(language_model: PreTrainedModel) -> Callable:
    def step(**inputs: Any) -> torch.Tensor:
        return language_model(**inputs).last_hidden_state

    return _own(step)


def _one_layer() -> Callable:
    def step(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(layer).forward(layer, *args, **kwargs)

    return _own(step)


def compile_bitwise(function: Callable) -> Callable:
    """A function compiled by inductor for static shapes; calls raise where its graph would break.

    In bf16 the kernels round where the function does, and no product with a weight takes another form (a bias added
    afterwards, a padded shape). On a CPU torch 2.11 did not round so.
    """
    options = {"emulate_precision_casts": True, "pattern_matcher": False}
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


def records(config: CompileConfig | None) -> bool:
    """Whether passes are recorded as CUDA graphs instead of compiled."""
    return config is not None and config.backend == "cudagraphs"


class RecordedScales(ScaleGraphs):
    """The language model's pass of each scale, recorded as a CUDA graph: the same kernels, without Python in between.

    A CUDA graph reads and writes fixed addresses. So there is a `GraphCache` for each shape of cache, which adopts a
    cache before its first scale. What cannot be recorded runs as usual, after a warning. Elsewhere than on a CUDA
    device nothing is recorded, and the pass is run again on the same fixed tensors. Weights that were put elsewhere,
    and adapters that were switched, scaled or merged, are noticed.

    Attributes: `graph_caches`, the latest first; `record`, which makes a graph of a function without arguments;
    `compile`, which compiles a function; `calls`, the compiled decoder layer of each (rows, length, columns looked at,
    columns of the cache); `compiles`, whether layers are compiled: wanted, and never failed.
    """

    def __init__(self, language_model: PreTrainedModel, config: CompileConfig | None) -> None:
        super().__init__(language_model, config)
        self.graph_caches: list[GraphCache] = []
        self.weights: list[int] = []
        self.adapted: list[nn.Module] = []
        self.record: Callable = record_cuda_graph
        self.compile: Callable = compile_bitwise
        self.compiles = bool((self.config.options or {}).get("compiled_layers"))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"graph_caches": []}

    def __call__(self, scale: int, columns: int, **inputs: Any) -> torch.Tensor:
        cache, mask, embeds = inputs[CACHE], inputs["attention_mask"], inputs["inputs_embeds"]
        if mask is None or mask.ndim != 4 or any(type(layer) is not StaticLayer for layer in cache.layers):
            _warn("flash attention and sliding layers cannot be recorded")
            return self.language_model(**inputs).last_hidden_state
        if mask.dtype == torch.bool:  # attention would do so in every layer
            zeros = torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device)
            inputs["attention_mask"] = mask = zeros.masked_fill_(~mask, -torch.inf)
        graph_cache = self._graph_cache(cache)
        graph_cache.adopt(cache)
        if scale <= graph_cache.scale:  # a new picture; between its scales nothing changes
            recorded = self._recorded_state()
            if graph_cache.recorded_state != recorded:
                graph_cache.graphs, graph_cache.recorded_state = {}, recorded
        graph_cache.scale = scale
        limit = min(rounded_up(columns), mask.shape[-1])
        tensors = {
            "inputs_embeds": embeds,
            "attention_mask": mask[..., :limit],
            "position_ids": inputs["position_ids"],
            "places": graph_cache.places(embeds.shape[1]),
        }
        key = scale, embeds.shape[1], limit
        if key not in graph_cache.graphs:
            graph_cache.graphs[key] = self._recorded(graph_cache, limit, tensors)
        graph = graph_cache.graphs[key]
        if graph is None:
            return self.language_model(**inputs).last_hidden_state
        hidden = graph(tensors)
        graph_cache.add(embeds.shape[1])
        return hidden

    def _recorded_state(self) -> list[Any]:
        """What a recording holds fast beside shapes: the addresses of the weights, and the state of their adapters."""
        weights = [weight.data_ptr() for weight in self.language_model.parameters()]
        if weights != self.weights:  # adapters do not come or go without it
            every = self.language_model.modules()
            self.weights, self.adapted = weights, [one for one in every if hasattr(one, "base_layer")]
        return weights + [
            (
                one.disable_adapters,
                *one.active_adapters,
                *getattr(one, "merged_adapters", ()),
                str(getattr(one, "scaling", "")),
            )
            for one in self.adapted
        ]

    def _graph_cache(self, cache: Cache) -> GraphCache:
        graph_cache = next((graph_cache for graph_cache in self.graph_caches if graph_cache.fits(cache)), None)
        if graph_cache is None:
            graph_cache = GraphCache(cache)
        else:
            self.graph_caches.remove(graph_cache)
        self.graph_caches = [graph_cache, *self.graph_caches][:GRAPH_CACHES]
        return graph_cache

    def _recorded(self, graph_cache: GraphCache, limit: int, tensors: dict[str, torch.Tensor]) -> Recording | None:
        """None if it cannot be done."""
        fused = bool((self.config.options or {}).get("fused_norms"))
        language_model, cache = self.language_model, graph_cache.cache

        def run(step: Callable | None, places: torch.Tensor, **fixed: torch.Tensor) -> torch.Tensor:
            write_to(cache, places, limit)
            with (
                torch.inference_mode(False),  # compiled functions are of one mode
                torch.no_grad(),
                fused_norms(language_model) if fused else nullcontext(),
                layers_through(step, language_model) if step else nullcontext(),
            ):
                return language_model(**fixed, **{CACHE: cache}, use_cache=True).last_hidden_state

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
            self.calls[key] = self.compile(_one_layer())
        return self.calls[key]


def _warn(what: str) -> None:
    warnings.warn(f"{what}: it runs without, which is slower and gives the same", stacklevel=3)


def scale_graphs(language_model: PreTrainedModel, config: CompileConfig | None) -> ScaleGraphs:
    return (RecordedScales if records(config) else ScaleGraphs)(language_model, config)


__all__ = ["RecordedScales", "ScaleGraphs", "records", "rounded_up", "scale_graphs", "with_room"]
