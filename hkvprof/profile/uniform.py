"""The old home of `hkvprof.uniform_profile`: goes on working until 0.2 (docs/versions.md)."""

from __future__ import annotations

from hkvprof.lazy import lazy_names

__getattr__ = lazy_names(__name__, {"uniform_profile": "hkvprof.calibration.uniform"})
