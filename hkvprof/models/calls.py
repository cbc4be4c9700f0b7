"""Names of transformers' arguments and results that releases have changed, asked of the code.

Since 5.24 `forward` and `generate` call the cache `cache`; before, `past_key_values`. Which one a
model takes is read from its signature, not from the release: a class of a user's own may lag
behind. A wrapper that takes anything and passes it on is taken to know the release's name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

NEW = "cache"
OLD = "past_key_values"
NAMES = (NEW, OLD)
"""Both names of the cache; a call may use either where the release knows the new one."""
_KNOWN: WeakKeyDictionary[Callable[..., Any], str] = WeakKeyDictionary()
"""By function, never by bound method: an entry must not keep a model alive."""


def cache_keyword(forward: Callable[..., Any]) -> str:
    """The name under which a `forward` takes its cache; the model's `generate` takes the same."""
    function = getattr(forward, "__func__", forward)
    try:
        known = _KNOWN.get(function)
    except TypeError:  # neither hashed nor referred to weakly: a callable of somebody's own
        return _asked(function)
    if known is None:
        known = _KNOWN[function] = _asked(function)
    return known


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` as the keyword argument that `model(...)` and `model.generate(...)` take."""
    return {cache_keyword(model.forward): cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's or `generate`'s output; None where there is none."""
    fields = getattr(output, "__dataclass_fields__", {})
    return next((getattr(output, name) for name in NAMES if name in fields), None)


def _asked(function: Callable[..., Any]) -> str:
    found = inspect.signature(function).parameters
    return next((name for name in NAMES if name in found), None) or _name_of_the_release()


@functools.cache
def _name_of_the_release() -> str:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return NEW if NEW in CausalLMOutputWithPast.__dataclass_fields__ else OLD
