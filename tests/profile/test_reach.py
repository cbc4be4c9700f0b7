"""The shortest plannable prompt, found by bisection, is the one that trying all lengths finds."""

from __future__ import annotations

import pytest

from hkvprof.errors import BudgetError
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.profile.costs import Menu
from hkvprof.profile.planning import Reach, find_reach

KEEP = KeepRule(2, 4, 16)


def dynamic(chunk: int) -> Strategy:
    return Strategy(HeadType.DYNAMIC, index="mean", chunk=chunk)


def possible(strategies: list[Strategy], share: float, tokens: int) -> bool:
    menu = Menu(tuple(strategies), KEEP, 64, tokens, 2)
    return all(menu.fits(strategy, share) for strategy in strategies)


def found(strategies: list[Strategy], share: float, calibrated: int) -> Reach:
    def ask(share: float, tokens: int) -> None:
        if not possible(strategies, share, tokens):
            raise BudgetError("too small")

    return find_reach(ask, share, calibrated, 6, sorted({s.chunk for s in strategies}))


@pytest.mark.parametrize("share", [0.08, 0.1, 0.15, 0.3])
@pytest.mark.parametrize("chunks", [[16], [8, 16], [4, 32]])
def test_shortest_prompt(share: float, chunks: list[int]) -> None:
    strategies = [dynamic(chunk) for chunk in chunks]
    every = [possible(strategies, share, tokens) for tokens in range(4000)]
    expected = next((n for n in range(3900) if all(every[n:])), None)
    if expected is None:  # the index of the smallest chunks alone is more, at any length
        assert found(strategies, share, 200).shortest is None
        return
    assert found(strategies, share, 200).shortest == expected


def test_what_the_calibration_needs() -> None:
    reach = found([dynamic(16)], 0.1, 300)
    assert not reach.covers_calibration
    assert reach.needed is not None
    assert possible([dynamic(16)], reach.needed, 300)
    assert reach.needed <= 0.2
    assert found([dynamic(16)], 0.1, reach.shortest or 0).covers_calibration
    assert found([dynamic(16)], 0.02, 300).shortest is None
