"""Ada-KV: SnapKV's scores, compared across the heads of a layer."""

from __future__ import annotations

from hkvprof.evaluate.baselines.base import PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import best_of_all, keep_marked, recent_count, snapkv_of

SAFEGUARD = 0.2
"""Share of an even budget that every head has for sure."""


@baseline("adakv", "Ada-KV (SnapKV)", "arXiv 2407.11550")
def adakv(prompt: PromptView) -> Selection:
    """A layer's best-scored tokens over all of its heads, and a fifth of the room for each head."""
    window = recent_count(prompt)
    safe = window + int(SAFEGUARD * (prompt.room - window))
    total = prompt.room * prompt.grid.kv_heads
    return keep_marked(prompt, [best_of_all(score, total, safe) for score in snapkv_of(prompt)])
