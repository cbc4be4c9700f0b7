"""Names of transformers' arguments and results that releases have changed, asked of the code.

Since 5.24 `forward` and `generate` call the cache `cache`; before, `past_key_values`. Which one a
model takes is read from its signature, not from the release: a class of one's own may lag behind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

NEW = "cache"
OLD = "past_key_values"
NAMES = (NEW, OLD)
"""Both names of the cache; a call may use either where the release knows the new one."""


def cache_keyword(forward: Callable[..., Any]) -> str:
    """The name under which a `forward` takes its cache; the model's `generate` takes the same."""
    return NEW if NEW in inspect.signature(forward).parameters else OLD


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` as the keyword argument that `model(...)` and `model.generate(...)` take."""
    return {cache_keyword(model.forward): cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's or `generate`'s output; None where there is none."""
    fields = getattr(output, "__dataclass_fields__", {})
    return getattr(output, NEW if NEW in fields else OLD, None)
