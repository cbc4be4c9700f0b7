"""Methods to compare with, on the product's own ragged cache, so that bytes are equal.

    from hkvprof.evaluate import baselines
    from hkvprof.evaluate.prefill import capture
    prefill = capture(model, processor.encode([messages]))
    with baselines.compress(model, prefill, "snapkv", share=0.10) as cache:
        model(input_ids=next_token, cache=cache)  # past_key_values before transformers 5.24

One file per method, one function in it: `select(prompt)` says what every head keeps.
"""

from __future__ import annotations

from hkvprof.evaluate.baselines.base import (
    Baseline,
    Kept,
    LayerPrompt,
    PromptView,
    baselines,
    find,
)
from hkvprof.evaluate.baselines.session import compress

__all__ = ["Baseline", "Kept", "LayerPrompt", "PromptView", "baselines", "compress", "find"]
