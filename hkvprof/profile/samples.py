"""The old home of `hkvprof.load_samples` and its like: works until 0.2 (docs/versions.md)."""

from __future__ import annotations

from hkvprof.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(("Sample", "load_samples", "open_images"), "hkvprof.samples.read"),
)
