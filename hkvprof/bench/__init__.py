"""Memory and speed of compressed caches beside transformers' own.

Two sources of caches: a loaded model that reads real prompts (`hkvprof bench --model`), and a
published shape whose caches are filled by hand, for a GPU (`python -m hkvprof.bench`, docs/gpu.md).
The second needs torch, triton, transformers and this folder, nothing else and no network.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Shaped:
    """Takes the place of `Float[Tensor, "..."]` and its like."""

    def __class_getitem__(cls, shape: Any) -> type:
        return cls


class _AnyName(ModuleType):
    """A module that has every public name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Shaped


# Where jaxtyping is not installed, its names stand in annotations alone: nothing looks into them.
if "jaxtyping" not in sys.modules and find_spec("jaxtyping") is None:
    sys.modules["jaxtyping"] = _AnyName("jaxtyping", "Stands in for jaxtyping (hkvprof).")
