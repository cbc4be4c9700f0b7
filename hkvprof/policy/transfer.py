"""What dynamic heads read from the host while decoding, before any model is loaded."""

from __future__ import annotations

from hkvprof.heads import HeadType, Strategy
from hkvprof.policy.menu import Menu

TURNOVER = 0.5
"""Part of the hot items that change per step: an upper bound, hit rates were 55% to 76% where every
step selects and nothing is smoothed (docs/retrieval.md)."""


def fetched_share(menu: Menu, strategy: Strategy, ratio: float) -> float:
    """Bytes a head fetches per decoding step at `ratio`, over the bytes of its dense K/V.

    Items that enter the hot buffer, and the exact keys that reranking reads. 0 for static heads,
    and for dynamic ones whose index leaves no room at this ratio or that hold everything.
    """
    if strategy.head_type is HeadType.STATIC or ratio >= 1:
        return 0.0
    layout = menu.layout(strategy, ratio)
    if layout is None:
        return 0.0
    items = TURNOVER * layout.hot
    if strategy.rerank:
        items += min(layout.items, layout.hot + strategy.rerank) / 2  # keys, not values
    return items * layout.chunk / menu.tokens
