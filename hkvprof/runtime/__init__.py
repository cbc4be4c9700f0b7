"""The online half: load a profile, compress, prove it. Needs torch and transformers alone.

The names below are loaded when first used, so that the import itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hkvprof.lazy import lazy_names

if TYPE_CHECKING:
    from hkvprof.runtime.accounts import measure_storage
    from hkvprof.runtime.cache import CompressedCache
    from hkvprof.runtime.handle import Handle, apply
    from hkvprof.runtime.receipt import Receipt

__all__ = ["CompressedCache", "Handle", "Receipt", "apply", "measure_storage"]

__getattr__ = lazy_names(
    __name__,
    {
        "CompressedCache": "hkvprof.runtime.cache",
        "Handle": "hkvprof.runtime.handle",
        "Receipt": "hkvprof.runtime.receipt",
        "apply": "hkvprof.runtime.handle",
        "measure_storage": "hkvprof.runtime.accounts",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
