"""Methods to compare with, on the product's own ragged cache, so that bytes are equal.

    from hkvprof.evaluate import baselines
    from hkvprof.evaluate.prefill import capture
    prefill = capture(model, processor.encode([messages]))
    with baselines.compress(model, prefill, "snapkv", share=0.10) as cache:
        model(input_ids=next_token, past_key_values=cache)

One file per method, one function in it: `select(prompt)` says what every head keeps.
"""

from __future__ import annotations

import importlib

from hkvprof.errors import UsageError
from hkvprof.evaluate.baselines.base import Baseline, Kept, LayerPrompt, Prompt, registered
from hkvprof.evaluate.baselines.session import compress

__all__ = ["Baseline", "Kept", "LayerPrompt", "Prompt", "baselines", "compress", "find"]

_FILES = (
    "streaming_llm", "snapkv", "pyramidkv", "adakv", "chunkkv", "keydiff", "expected_attention",
    "kvzip", "duo_attention", "razor_attention", "quest", "look_m", "madakv", "sparsemm",
    "hybridkv", "random_tokens", "snapkv_max", "all_static", "all_dynamic", "no_head_level",
    "no_type_level",
)  # fmt: skip


def baselines() -> dict[str, Baseline]:
    """All methods by name."""
    for name in _FILES:
        importlib.import_module(f"{__name__}.{name}")
    return registered()


def find(name: str) -> Baseline:
    """The method called `name`. Raises UsageError."""
    known = baselines()
    if name not in known:
        raise UsageError(f"unknown baseline {name!r}: expected one of {', '.join(known)}")
    return known[name]
