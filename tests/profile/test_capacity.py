"""Searches for what fits and what can be planned: against sums by hand, and trying every step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hkvprof.errors import BudgetError
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.profile.capacity import CONTEXT_STEP, SHARES, Fit, Reach, Room, find_fit, find_reach
from hkvprof.profile.costs import Menu
from hkvprof.profile.forecast import Forecast, HeadForecast, LayerForecast
from tests.profiles import make_profile

LAYERS, TOKEN_BYTES = 4, 25
"""Of the made-up plans below: 100 bytes per token in all."""


def made_up(share: float, tokens: int, rows: int) -> Forecast:
    """A share of all bytes, at least 10 tokens; compressed ones have 1000 bytes of tables each."""
    if share < 1 and share * tokens < 10:
        raise BudgetError(f"budget {share} is too small")
    whole = rows * tokens * TOKEN_BYTES
    kind = "whole" if share >= 1 else "static"
    tables = 0 if share >= 1 else 1000
    head = HeadForecast(kind, kind, share, tokens, int(share * whole), 0, tables, 0.0)
    layers = (LayerForecast((head,)),) * LAYERS
    return Forecast(share, tokens, rows, 2, LAYERS * whole, layers, 0.01, None)


def ask(left: int, tokens: int = 1000, rows: int = 1) -> Fit:
    return find_fit(made_up, tokens, rows, 0.1, Room(left + 700, 500, 200))


def test_room() -> None:
    assert Room(24, 15, 1).left == 8
    assert Room(24, 24, 1).left == -1


def test_what_fits_dense_is_left_dense() -> None:
    fit = ask(100_000)
    assert fit.dense_fits
    assert fit.best is not None
    assert fit.best.is_dense
    assert not ask(99_999).dense_fits


def test_the_largest_budget_by_hand() -> None:
    """Of 100,000 bytes: 4,000 of tables and a layer of 25,000 leave a share of 70,999 of 99,999."""
    fit = ask(99_999)
    assert fit.best is not None
    assert fit.best.share == 0.7099
    assert fit.best.peak_bytes == 70_988 + 4_000 + 25_000  # 4 * int(0.7099 * 25,000)
    assert fit.smallest is not None
    assert fit.smallest.share == 0.01


@pytest.mark.parametrize("left", [30_000, 30_017, 50_000, 98_765])
def test_the_largest_budget_is_that_of_trying_all(left: int) -> None:
    fits = [
        step
        for step in range(1, SHARES)
        if step / SHARES * 1000 >= 10 and made_up(step / SHARES, 1000, 1).peak_bytes <= left
    ]
    best = ask(left).best
    assert best is not None
    assert best.share == fits[-1] / SHARES


def test_not_even_the_smallest() -> None:
    fit = ask(29_999)
    assert fit.best is None
    assert fit.smallest is not None
    assert fit.smallest.peak_bytes == 1_000 + 4_000 + 25_000
    assert ask(30_000).best == fit.smallest


def test_a_prompt_too_short_for_any_budget_has_none() -> None:
    fit = ask(100, tokens=9)
    assert fit.smallest is None
    assert fit.best is None


def test_the_longest_prompt_and_the_largest_batch_by_hand() -> None:
    """A compressed token costs 10 bytes and 25 while it comes in, beside 4,000 of tables."""
    fit = ask(200_000, tokens=1000, rows=2)
    assert fit.context == (200_000 - 4_000) // (2 * 35) // CONTEXT_STEP * CONTEXT_STEP == 2_560
    assert fit.batch == (200_000 - 4_000) // 35_000 == 5
    assert fit.dense_context == 200_000 // (2 * 100) // CONTEXT_STEP * CONTEXT_STEP == 768
    assert fit.dense_batch == 2


def test_without_room_nothing_fits() -> None:
    fit = find_fit(made_up, 1000, 1, 0.1, Room(100, 90, 50))
    assert fit.best is None
    assert (fit.context, fit.batch, fit.dense_context, fit.dense_batch) == (0, 0, 0, 0)


def test_real_plans_fit_and_one_step_more_does_not() -> None:
    profile = replace(make_profile(), keep=KeepRule(2, 4, 16))

    def plan(share: float, tokens: int, rows: int) -> Forecast:
        return profile.plan(share, tokens, rows=rows)

    dense = 2 * 4096 * profile.grid.token_bytes(2)
    room = Room(dense * 3 // 4, 0, 0)
    fit = find_fit(plan, 4096, 2, 0.1, room)
    assert fit.best is not None
    assert fit.best.peak_bytes <= room.left
    assert plan(fit.best.share + 1 / SHARES, 4096, 2).peak_bytes > room.left
    assert plan(0.1, fit.context, 2).peak_bytes <= room.left
    assert plan(0.1, fit.context + CONTEXT_STEP, 2).peak_bytes > room.left
    assert plan(0.1, 4096, fit.batch).peak_bytes <= room.left
    assert plan(0.1, 4096, fit.batch + 1).peak_bytes > room.left


def test_the_searches_reach_their_ends() -> None:
    fit = ask(10**12)
    assert (fit.context, fit.dense_context) == (2**24, 2**24)
    assert (fit.batch, fit.dense_batch) == (2**16, 2**16)


KEEP = KeepRule(2, 4, 16)


def dynamic(chunk: int) -> Strategy:
    return Strategy(HeadType.DYNAMIC, index="mean", chunk=chunk)


def possible(strategies: list[Strategy], share: float, tokens: int) -> bool:
    menu = Menu(tuple(strategies), KEEP, 64, tokens, 2)
    return all(menu.fits(strategy, share) for strategy in strategies)


def reach_of(strategies: list[Strategy], share: float, calibrated: int) -> Reach:
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
        assert reach_of(strategies, share, 200).shortest is None
        return
    assert reach_of(strategies, share, 200).shortest == expected


def test_what_the_calibration_needs() -> None:
    reach = reach_of([dynamic(16)], 0.1, 300)
    assert not reach.covers_calibration
    assert reach.needed is not None
    assert possible([dynamic(16)], reach.needed, 300)
    assert reach.needed <= 0.2
    assert reach_of([dynamic(16)], 0.1, reach.shortest or 0).covers_calibration
    assert reach_of([dynamic(16)], 0.02, 300).shortest is None
