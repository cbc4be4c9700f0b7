"""Ratios of an engine's plan make the transformers runtime keep the same, in the same bits."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.heads import HeadGrid
from hkvprof.profile.block_ratios import as_allocation
from hkvprof.profile.blocks import plan_blocks
from hkvprof.profile.costs import static_layout
from tests.engines.curves import random_profile

GRID = HeadGrid(3, 4, 2, 32)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999), share=st.floats(0.05, 1.0), size=st.sampled_from([16, 32]),
    tokens=st.integers(40, 30_000), itemsize=st.sampled_from([2, 4]),
)  # fmt: skip
def test_heads_keep_as_many_tokens_as_their_blocks_hold(
    seed: int, share: float, size: int, tokens: int, itemsize: int
) -> None:
    plan = plan_blocks(random_profile(GRID, seed), share, size, itemsize)
    made, given_ratios = plan.at(tokens), as_allocation(plan, tokens)
    for (layer, head), number in np.ndenumerate(plan.group):
        ratio = float(given_ratios.ratio[layer, head])
        strategy = plan.strategies[int(given_ratios.strategy[layer, head])]
        assert strategy == plan.head(layer, head)
        is_whole = made.dropped[number] == 0
        assert (ratio >= 1) == is_whole
        if not is_whole:
            layout = static_layout(strategy, ratio, tokens, plan.keep, GRID.head_dim, itemsize)
            assert layout.exact + layout.quantised == made.kept_tokens[number]
    assert given_ratios.expected_loss == made.expected_loss
