"""The online half: load a profile, compress, prove it. Needs torch and transformers alone.

The names below are loaded when first used, so that the import itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hkvprof.runtime.cache import CompressedCache
    from hkvprof.runtime.handle import Handle, apply
    from hkvprof.runtime.receipt import Receipt, measure_storage

__all__ = ["CompressedCache", "Handle", "Receipt", "apply", "measure_storage"]

_HOMES = {
    "CompressedCache": "hkvprof.runtime.cache",
    "Handle": "hkvprof.runtime.handle",
    "Receipt": "hkvprof.runtime.receipt",
    "apply": "hkvprof.runtime.handle",
    "measure_storage": "hkvprof.runtime.receipt",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
