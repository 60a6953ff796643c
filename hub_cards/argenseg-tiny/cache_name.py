"""The name under which models, their outputs and `generate` hand on the key-value cache.

transformers 5.24 renamed `past_key_values` to `cache`. Callers may still pass the old name for some releases; outputs
have the new one only.
"""

from collections.abc import Callable
from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

NEW_NAME, OLD_NAME = "cache", "past_key_values"
CACHE = NEW_NAME if NEW_NAME in {field.name for field in fields(BaseModelOutputWithPast)} else OLD_NAME


def deprecates_past_key_values(forward: Callable) -> Callable:
    """Lets a forward that takes both names warn of the old one, in transformers' own words."""
    return forward if CACHE == OLD_NAME else deprecate_kwarg(OLD_NAME, "5.40.0", new_name=NEW_NAME)(forward)


__all__ = ["CACHE", "deprecates_past_key_values"]
