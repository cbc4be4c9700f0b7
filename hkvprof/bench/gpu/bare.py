"""For machines that have torch, triton and transformers, and where nothing can be installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Shaped:
    """Takes the place of `Float[Tensor, "..."]` and its like."""

    def __class_getitem__(cls, shape: Any) -> type:
        return cls


class _Names(ModuleType):
    """A module that has every public name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Shaped


def names_for_annotations() -> None:
    """Where jaxtyping is not installed, let its names be imported.

    They stand in annotations and in aliases of types alone, which nothing here looks into.
    """
    if "jaxtyping" not in sys.modules and find_spec("jaxtyping") is None:
        sys.modules["jaxtyping"] = _Names("jaxtyping", "Stands in for jaxtyping (hkvprof).")
