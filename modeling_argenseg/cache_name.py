"""The name under which models, their outputs and `generate` hand on the key-value cache.

transformers 5.24 made `cache` of `past_key_values`; the old name is taken for some time yet, but nothing is handed on
under it.
"""

from collections.abc import Callable
from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

NEW_NAME, OLD_NAME = "cache", "past_key_values"
CACHE = NEW_NAME if NEW_NAME in {field.name for field in fields(BaseModelOutputWithPast)} else OLD_NAME


def warns_of_the_old_name(forward: Callable) -> Callable:
    """A method that takes `cache` and `past_key_values`; what it says of the latter is what transformers says."""
    return forward if CACHE == OLD_NAME else deprecate_kwarg(OLD_NAME, "5.40.0", new_name=NEW_NAME)(forward)


__all__ = ["CACHE", "warns_of_the_old_name"]
