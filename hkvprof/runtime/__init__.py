"""The online half: load a profile, compress, prove it. Light: torch and transformers alone."""

from hkvprof.runtime.apply import Handle, apply
from hkvprof.runtime.cache import CompressedCache
from hkvprof.runtime.receipt import Receipt, measure_storage

__all__ = ["CompressedCache", "Handle", "Receipt", "apply", "measure_storage"]
