"""Steps of static shape: a static cache with room for pictures, and one compiled graph for each scale.

With `cache_implementation="static"` every pass of the language model has the same shapes from picture to picture. On a
GPU transformers then compiles by itself; so does each scale here, under the same conditions and with the same
`compile_config`, whose default, "reduce-overhead", makes CUDA graphs.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

ROOM = 128  # columns; static caches are sized in multiples of it, so that prompts of like length share their graphs


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
        self.calls: dict[tuple[int, int], Callable] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"calls": {}}  # a copy of the model compiles its own

    def __call__(self, scale: int, **inputs: Any) -> torch.Tensor:
        """Hidden states (R, l, hidden) of the queries of one scale."""
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


__all__ = ["ScaleGraphs", "rounded_up", "with_room"]
