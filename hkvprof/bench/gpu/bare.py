"""For machines that have torch, triton and transformers, and where nothing can be installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Names(ModuleType):
    """A module in which every public name is `object`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def names_for_annotations() -> None:
    """Where jaxtyping is not installed, let its names be imported.

    They stand in annotations alone, and no annotation of this package is ever evaluated.
    """
    if "jaxtyping" not in sys.modules and find_spec("jaxtyping") is None:
        sys.modules["jaxtyping"] = _Names("jaxtyping", "Stands in for jaxtyping (hkvprof).")
