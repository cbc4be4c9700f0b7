"""Plans: figures worked out by hand, bounds for any profile, and the time that planning takes."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.errors import BudgetError, UsageError
from hkvprof.heads import HeadGrid, HeadType, KeepRule, Strategy
from hkvprof.profile.budgets import INFEASIBLE, Allocation
from hkvprof.profile.forecast import Forecast, forecast
from hkvprof.profile.planning import Menu, Rules, poorest_loss
from hkvprof.profile.record import Profile
from tests.profiles import STRATEGIES, make_profile

SEVEN_B = HeadGrid(layers=28, query_heads=28, kv_heads=4, head_dim=128)
MENU = (
    Strategy(HeadType.STATIC, pool=1),
    Strategy(HeadType.STATIC, pool=7),
    Strategy(HeadType.STATIC, pool=31),
    Strategy(HeadType.DYNAMIC, index="projected", bits=16, rerank=64),
    Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=64),
    Strategy(HeadType.DYNAMIC, index="mean", chunk=16),
)


def many_curves(seed: int, grid: HeadGrid = SEVEN_B, points: int = 14) -> Profile:
    """Six strategies and `points` ratios: curves that fall as measured ones do, with noise."""
    rng = np.random.default_rng(seed)
    ratios = np.append(np.geomspace(0.005, 0.7, points - 1), 1).astype(np.float32)
    shape = (len(MENU), grid.layers, grid.kv_heads)
    scale = rng.lognormal(0, 1.5, (1, *shape[1:], 1))
    fall = ratios ** -rng.uniform(0.3, 1.5, (*shape, 1)) * (1 - ratios) ** 2
    loss = (scale * fall * rng.lognormal(0, 0.15, (*shape, points))).astype(np.float32)
    return replace(
        make_profile(grid=grid),
        keep=KeepRule(2, 4, 16),
        strategies=MENU,
        strategy=np.zeros(shape[1:], np.uint8),
        ratios=ratios,
        lengths=np.array([1000]),
        loss=loss[None],
        output_error=loss[None].copy(),
        static_margin=None,
    )


def test_four_heads_by_hand() -> None:
    """1000 tokens, width 8, 2 bytes: 32 bytes per token, 32,000 for a dense head.

    - static at 10%: 100 tokens, 3200 bytes and the 8 of its end;
    - whole: 32,000 and 8;
    - mean, chunks of 16, at 20%: 1000 - 6 = 994 tokens are 62 chunks and 2 more recent ones, 8
      tokens whole; 6400 - 8 * 32 - 62 * 16 = 5152 bytes are 9 hot chunks of 520 bytes. Resident:
      8 + 144 tokens or 4864 bytes, 992 of index, 72 of slots, 8. Host: 992 * 32;
    - projected, 32 bits, at 20%: 994 tokens behind 4 bytes each; 6400 - 6 * 32 - 3976 = 2232 bytes
      are 55 hot tokens of 40 bytes. Resident: 61 tokens or 1952 bytes, 3976, 440, 8.
    """
    menu = Menu(STRATEGIES, KeepRule(2, 4, 16), 8, 1000, 2)
    allocation = Allocation(
        np.array([[0, 1], [2, 3]], np.uint8),
        np.array([[0.1, 1.0], [0.2, 0.2]], np.float32),
        0.0,
        np.array([[0.5, 0.25], [0.125, 1.0]]),
    )
    losses = np.broadcast_to(np.float32([4, 2, 0]), (4, 2, 2, 3))
    ratios = np.float32([0.05, 0.5, 1])
    plan = forecast(menu, allocation, 0.375, 3, [0, 0, 0, 700], ratios, losses)
    heads = [head for layer in plan.layers for head in layer.heads]
    assert [head.kind for head in heads] == ["static", "whole", "dynamic", "dynamic"]
    assert [head.resident_tokens for head in heads] == [100, 1000, 152, 61]
    one = [3208, 32008, 4864 + 992 + 72 + 8, 1952 + 3976 + 440 + 8]
    assert [head.resident_bytes for head in heads] == [3 * size for size in one]
    assert [head.host_bytes for head in heads] == [0, 0, 3 * 992 * 32, 3 * 994 * 32]
    assert [head.table_bytes for head in heads] == [0, 0, 0, 700]
    assert plan.layers[0].resident_bytes == 3 * (3208 + 32008)
    assert plan.dense_bytes == 3 * 4 * 32000
    assert plan.device_bytes == 3 * sum(one) + 700
    assert plan.peak_bytes == plan.device_bytes + 3 * 2 * 32000
    assert plan.expected_loss == 0.5 + 0 + 0.125 + 1.0
    assert plan.reference_loss == 16
    assert plan.relative_loss == 1.625 / 16
    assert not plan.is_dense


def test_the_tables_of_a_projected_head() -> None:
    """Width 8, 4 channels: 2 * 8 * 4 + 8 + 256 * 4 numbers of 4 bytes; a 16-bit one has 3."""
    profile = make_profile()
    assert profile.index is not None
    assert profile.index.head_bytes == {16: 4 * (48 + 8 + 768), 32: 4 * (64 + 8 + 1024)}


def test_the_whole_budget_is_the_dense_cache() -> None:
    plan = many_curves(0).plan(1.0, 4096, rows=2)
    assert plan.is_dense
    assert plan.resident_bytes == plan.peak_bytes == plan.dense_bytes == 2 * 4096 * 57344
    assert (plan.table_bytes, plan.host_bytes, plan.expected_loss) == (0, 0, 0.0)


def test_budgets_in_tokens_and_bytes_are_shares() -> None:
    profile = many_curves(1)
    share = profile.plan(0.125, 32768, rows=4)
    assert profile.plan(4096, 32768, rows=4) == share
    assert profile.plan(4 * 4096 * 57344, 1).is_dense  # tokens, more than there are
    assert profile.plan(f"{4 * 4096 * 57344}B", 32768, rows=4) == share


@given(st.integers(0, 2**16), st.floats(0.01, 1), st.integers(300, 40_000), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_no_plan_is_over_its_budget(seed: int, share: float, tokens: int, rows: int) -> None:
    """Beside the budget there is nothing but 8 bytes per head and row."""
    profile = many_curves(seed, HeadGrid(4, 4, 2, 64), points=6)
    try:
        plan = profile.plan(share, tokens, rows=rows)
    except BudgetError:
        return
    assert plan.resident_bytes <= share * plan.dense_bytes * (1 + 1e-9) + 8 * rows * 8
    assert plan.resident_bytes >= 0.75 * share * plan.dense_bytes
    assert plan.expected_loss is not None
    expected = profile.allocation(share, tokens, rows=rows).expected_loss
    assert plan.expected_loss == pytest.approx(expected, abs=1e-9)
    assert sum(layer.resident_bytes for layer in plan.layers) == plan.resident_bytes


@given(st.integers(0, 2**16), st.floats(0.02, 1), st.floats(0.02, 1))
@settings(max_examples=60, deadline=None)
def test_more_budget_never_loses_more(seed: int, a: float, b: float) -> None:
    profile = many_curves(seed, HeadGrid(4, 4, 2, 64), points=6)
    less, more = (profile.plan(share, 8192) for share in sorted((a, b)))
    assert less.relative_loss is not None
    assert more.relative_loss is not None
    assert 0 <= more.relative_loss <= less.relative_loss + 1e-9 <= 1 + 2e-9
    for few, many in zip(_ratios(less), _ratios(more), strict=True):
        assert many >= few - 1e-7


def _ratios(plan: Forecast) -> list[float]:
    return [head.ratio for layer in plan.layers for head in layer.heads]


def test_heads_below_what_was_measured_are_counted() -> None:
    profile = many_curves(2)
    assert profile.plan(0.005, 32768).below_measured == 0
    assert profile.plan(0.004, 32768).below_measured == 112
    assert profile.plan(0.004, 32768).relative_loss == pytest.approx(1.0)


def test_the_poorest_plan_is_static_where_there_is_a_choice() -> None:
    loss = np.float32([[[[3, 1]]], [[[2, 1]]], [[[1, 1]]]])
    static, dynamic = MENU[0], MENU[5]
    assert poorest_loss((static, static, dynamic), loss) == 2
    assert poorest_loss((dynamic,) * 3, loss) == 1
    loss[:] = INFEASIBLE
    assert poorest_loss((dynamic,) * 3, loss) is None


def test_a_profile_that_measured_nothing_expects_nothing() -> None:
    plan = make_profile("uniform").plan(0.2, 2000)
    assert plan.expected_loss is plan.relative_loss is plan.reference_loss is None
    assert math.isnan(plan.layers[0].loss)


def test_a_paper_profile_reads_its_curves() -> None:
    """Strategies stay and ratios scale; the loss is the chosen strategy's at the ratio."""
    profile = make_profile("paper")
    plan = profile.plan(0.375, 2000)
    allocation = profile.allocation(0.375, 2000)
    np.testing.assert_allclose(allocation.ratio, 4 * profile.budget, rtol=1e-6)
    own = [profile.loss_at(2000)[profile.strategy[i, j], i, j] for i, j in np.ndindex(3, 2)]
    expected = sum(curve[3 - i % 2] for i, curve in enumerate(own))
    assert plan.expected_loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("recipe", ["measured", "paper", "uniform"])
def test_a_plan_is_json(recipe: str) -> None:
    plan = make_profile(recipe).plan(0.2, 2000, rows=2)
    record = plan.to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["resident_bytes"] == sum(entry["resident_bytes"] for entry in record["layers"])
    assert len(record["layers"][0]["heads"]) == 2
    assert "layers" not in plan.to_json(with_layers=False)


def test_plans_for_nothing_are_refused() -> None:
    profile = make_profile()
    with pytest.raises(UsageError, match="at least one prompt of one token, found 0 of 400"):
        profile.plan(0.2, 400, rows=0)
    with pytest.raises(UsageError, match="too small"):
        profile.plan(0.2, 3)


def calls(action: Callable[[], object]) -> int:
    """How many functions are called: what takes time, whatever the machine."""
    counts = Counter[str]()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: counts.update((event,)))
    try:
        action()
    finally:
        sys.setprofile(before)
    return counts["call"] + counts["c_call"]


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.2, 0.5])
def test_planning_takes_milliseconds(budget: float) -> None:
    """28 x 4 heads, 6 strategies, 14 ratios, at any length of the prompt."""
    profile = many_curves(3)
    margin = np.full_like(profile.loss[:, 0], 0.01)
    profile = replace(profile, static_margin=margin, rules=Rules(0.5))
    assert 10_000 < calls(lambda: profile.plan(budget, 32768)) < 30_000
    assert calls(lambda: profile.plan(budget, 10**7)) < 30_000
