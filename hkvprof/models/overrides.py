"""Methods of one model replaced, reversibly, and left behind by copies of the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from hkvprof.models.attention import unhook_config

_GONE = object()
Method = Callable[..., Any]
Around = Callable[[Method, tuple[Any, ...], dict[str, Any]], Any]
"""Called in a method's place with what the method was, and the arguments."""


class Overrides:
    """Replaces methods on an instance, and sets attributes, until `restore`.

    An instance's attribute is found by every way of calling it: `model(...)`, `model.forward(...)`,
    and through wrappers that go round `__call__`, such as peft's. Each replacement leaves
    torch.compile's tracing, because caches keep books in Python; parts that a user compiled below
    it stay compiled. What was kept elsewhere of a replacement calls the original once `restore`d.

    Copies (copy.deepcopy, pickle, torch.save) are of the model as it was before, with the attention
    that it had.
    """

    def __init__(
        self, model: Any, methods: Mapping[str, Around], attributes: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._active = True
        self._own = {name: self._wrap(name, around) for name, around in methods.items()}
        self._own |= attributes
        self._own |= {"__deepcopy__": self._deepcopy, "__reduce_ex__": self._reduce}
        self._before = {name: vars(model).get(name, _GONE) for name in self._own}
        vars(model).update(self._own)

    def restore(self) -> None:
        """Give everything back, but for methods that somebody wrapped meanwhile: those pass on."""
        self._active = False
        self._take_off(vars(self._model))

    def _plain(self) -> dict[str, Any]:
        """The model's attributes without what was set here."""
        return self._take_off(dict(vars(self._model)))

    def _take_off(self, attributes: dict[str, Any]) -> dict[str, Any]:
        for name, before in self._before.items():
            if attributes.get(name) is not self._own[name]:
                continue
            if before is _GONE:
                del attributes[name]
            else:
                attributes[name] = before
        return attributes

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

    def _deepcopy(self, memo: dict[int, Any]) -> Any:
        clone = _empty(type(self._model))
        memo[id(self._model)] = clone
        vars(clone).update(copy.deepcopy(self._plain(), memo))
        unhook_config(clone.config)
        return clone

    def _reduce(self, protocol: int) -> tuple[Any, ...]:
        return _empty, (type(self._model),), _State(self._plain())


class _State:
    """A model's attributes on their way through a file; `dict.update` reads them as a mapping.

    Only when they come out of one is the model a copy whose config is its own: then its attention
    is made that of a model without a profile. copy.copy shares the config.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self._loaded = False

    def __getstate__(self) -> dict[str, Any]:
        return self._values

    def __setstate__(self, values: dict[str, Any]) -> None:
        self._values, self._loaded = values, True

    def keys(self) -> Iterator[str]:
        """The names of the attributes."""
        if self._loaded:
            unhook_config(self._values["config"])
        return iter(self._values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]


def _empty(kind: type[Any]) -> Any:
    """A new object of a model's class without any attribute; its `__init__` does not run."""
    return object.__new__(kind)
