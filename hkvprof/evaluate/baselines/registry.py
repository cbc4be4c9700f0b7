"""Methods by name."""

from __future__ import annotations

import importlib

from hkvprof.errors import UsageError
from hkvprof.evaluate.baselines.base import Baseline, registered

_FILES = (
    "streaming_llm", "snapkv", "pyramidkv", "adakv", "chunkkv", "keydiff", "expected_attention",
    "kvzip", "duo_attention", "razor_attention", "quest", "look_m", "madakv", "sparsemm",
    "hybridkv", "random_tokens", "snapkv_max", "all_static", "all_dynamic", "no_head_level",
    "no_type_level", "hybridkv_offline",
)  # fmt: skip


def baselines() -> dict[str, Baseline]:
    """All methods by name."""
    for name in _FILES:
        importlib.import_module(f"hkvprof.evaluate.baselines.{name}")
    return registered()


def find(name: str) -> Baseline:
    """The method called `name`. Raises UsageError."""
    known = baselines()
    if name not in known:
        raise UsageError(f"unknown baseline {name!r}: expected one of {', '.join(known)}")
    return known[name]
