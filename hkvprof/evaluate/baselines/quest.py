"""Quest: retrieval on all heads, by the bounds of a chunk's keys."""

from __future__ import annotations

from hkvprof.evaluate.baselines.base import PromptView, Selection, baseline
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.runtime.plan import HeadPlan

CHUNK = 16


@baseline("quest", "Quest-like retrieval", "arXiv 2406.10774", keep=KeepRule(2, 4, 16))
def quest(prompt: PromptView) -> Selection:
    """Every head keeps the smallest and largest key of each chunk of 16 and fetches the best.

    The digests are part of the share: at chunks of 16 they alone take 1/16 of the dense bytes,
    and below that share larger chunks take their place.
    """
    chunk = CHUNK
    while 1 / chunk > prompt.share / 2:
        chunk *= 2
    plan = HeadPlan(Strategy(HeadType.DYNAMIC, index="minmax", chunk=chunk), prompt.share)
    return [[plan] * prompt.grid.kv_heads for _ in prompt.layers]
