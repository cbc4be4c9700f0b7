"""Names of transformers' arguments and results that releases have changed, asked of the code.

Since 5.24 `forward` and `generate` call the cache `cache`; before, `past_key_values`. Which one a
model takes is read from its signature, not from the release: a class of a user's own may lag
behind. A wrapper that takes anything and passes it on is taken to know the release's name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from hkvprof.errors import UsageError
from hkvprof.models.wrappers import unwrap

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


def rope_holder(model: Any) -> Any:
    """The module on which Qwen-VL models keep a conversation's M-RoPE offset (`rope_deltas`);
    None for other models."""
    inner = getattr(unwrap(model), "model", None)
    return inner if hasattr(inner, "rope_deltas") else None


def last_row_only(model: Any) -> dict[str, Any]:
    """Arguments that make a forward pass compute logits of the last row alone, where supported.

    At 3,000 tokens and a vocabulary of 49,152 the other rows are 590 MB of float32 for nothing.
    """
    supported = "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters
    return {"logits_to_keep": 1} if supported else {}


class Signature:
    """The parameters of a `forward` or `generate`, read once.

    `keyword` is the cache's name; `generate` takes it among its keywords, under the name that the
    model's `forward` has for it.
    """

    def __init__(self, call: Callable[..., Any], keyword: str | None = None) -> None:
        parameters = inspect.signature(call).parameters.values()
        simple = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = tuple(p.name for p in parameters if p.kind in simple)
        self.named = frozenset(self.positional) | {
            p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY
        }
        self.keyword = keyword or cache_keyword(call)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call with these arguments; the cache has the name that this release takes.

        Raises UsageError for two caches.
        """
        call = Call(self, list(args), dict(kwargs))
        cache = call.cache
        strange = [name for name in NAMES if name in call.others and name != self.keyword]
        for name in strange:
            del call.kwargs[name]
        if strange and cache is not None:
            call.set(self.keyword, cache)
        return call


@dataclass
class Call:
    """Arguments of one call, given by position or by keyword."""

    signature: Signature
    args: list[Any]
    kwargs: dict[str, Any]

    def get(self, name: str) -> Any:
        """An argument; None where it was not given."""
        place = self._place(name)
        return self.kwargs.get(name) if place is None else self.args[place]

    def set(self, name: str, value: Any) -> None:
        """Give an argument, where it was given before if it was."""
        place = self._place(name)
        if place is None:
            self.kwargs[name] = value
        else:
            self.args[place] = value

    @property
    def cache(self) -> Any:
        """The cache, under either of its names. Raises UsageError for two different ones."""
        given = [c for c in (self.get(name) for name in NAMES) if c is not None]
        if len(given) == 2 and given[0] is not given[1]:
            raise UsageError(
                f"two caches were given, as {NAMES[0]} and as {NAMES[1]}: give the one that is "
                f"meant, as {self.signature.keyword}"
            )
        return given[0] if given else None

    def set_cache(self, cache: Any) -> None:
        """Give a cache where there was none: under the name that this release takes."""
        self.set(self.signature.keyword, cache)

    @property
    def rows(self) -> int | None:
        """Batch rows of the ids or embeddings; None where neither was given."""
        for name in ("input_ids", "inputs_embeds"):
            if (found := self.get(name)) is not None:
                return int(found.shape[0])
        return None

    @property
    def others(self) -> dict[str, Any]:
        """Keywords that the signature does not name."""
        return {k: v for k, v in self.kwargs.items() if k not in self.signature.named}

    def _place(self, name: str) -> int | None:
        names = self.signature.positional[: len(self.args)]
        return names.index(name) if name in names else None
