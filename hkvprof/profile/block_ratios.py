"""A plan in blocks as ratios of single heads, by which the transformers runtime keeps the same."""

from __future__ import annotations

import numpy as np

from hkvprof.profile.blocks import BlockPlan
from hkvprof.profile.budgets import Allocation
from hkvprof.profile.pages import exact_slots


def as_allocation(plan: BlockPlan, tokens: int) -> Allocation:
    """Strategies and ratios [layers, kv_heads] under which every head keeps as many tokens of a
    prompt of `tokens` tokens, in the same bits, as its blocks hold; from 1.0 on it is whole."""
    made, ratios = plan.at(tokens), []
    for page, bits, kept in zip(plan.pages, made.bits, made.kept_tokens, strict=True):
        taken = kept * page.slot_bytes
        if bits == page.bits and not page.is_exact:
            exact = exact_slots(plan.keep)
            taken = exact * page.slot_bytes + (kept - exact + 1) * page.row_bytes
        ratios.append(taken / page.slot_bytes / tokens)
    # The next number above, so that no token is lost in rounding.
    above = np.nextafter(np.array(ratios, dtype=np.float32), np.float32(2))
    return Allocation(plan.strategy.astype(np.uint8), above[plan.group], made.expected_loss)
