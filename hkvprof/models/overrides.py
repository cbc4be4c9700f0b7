"""Methods of one model replaced, reversibly, and left behind by copies of the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

_GONE = object()
Method = Callable[..., Any]
Around = Callable[[Method, tuple[Any, ...], dict[str, Any]], Any]
"""Called in a method's place with what the method was, and the arguments."""


class Overrides:
    """Replaces methods on an instance until `restore`.

    An instance's attribute is found by every way of calling it: `model(...)`, `model.forward(...)`,
    and through wrappers that go round `__call__`, such as peft's. Each replacement leaves
    torch.compile's tracing, because caches keep books in Python; parts that a user compiled below
    it stay compiled. What was kept elsewhere of a replacement calls the original once `restore`d.

    `copied(clone)` is called with a copy of the model (copy.deepcopy, pickle), which has the
    original methods; it must be importable by name for pickle.
    """

    def __init__(self, model: Any, methods: Mapping[str, Around]) -> None:
        self._model = model
        self._before = {name: vars(model).get(name, _GONE) for name in methods}
        self._active = True
        self._own = {name: self._wrap(name, around) for name, around in methods.items()}
        vars(model).update(self._own)

    def restore(self) -> None:
        """Give the methods back, but for those that somebody wrapped meanwhile: those pass on."""
        self._active = False
        for name, before in self._before.items():
            if vars(self._model).get(name) is not self._own[name]:
                continue
            del vars(self._model)[name]
            if before is not _GONE:
                vars(self._model)[name] = before

    def without(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of the model's attributes as they would be without the replacements."""
        plain = dict(state)
        for name, before in self._before.items():
            if plain.get(name) is self._own[name]:
                del plain[name]
                if before is not _GONE:
                    plain[name] = before
        return plain

    def _wrap(self, name: str, around: Around) -> Method:
        found = getattr(self._model, name)
        # What torch.compile made of a method would trace into caches; its original does not.
        original = getattr(found, "_torchdynamo_orig_callable", found)

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return found(*args, **kwargs)
            return around(original, args, kwargs)

        return torch.compiler.disable(replacement)


def copy_plain(model: Any, state: dict[str, Any], memo: dict[int, Any]) -> Any:
    """A deep copy of a model that has `state` for its attributes."""
    clone = type(model).__new__(type(model))
    memo[id(model)] = clone
    vars(clone).update(copy.deepcopy(state, memo))
    return clone
