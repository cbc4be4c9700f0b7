"""Planning under a budget of reads beside that of bytes."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from hkvprof.errors import BudgetError, UsageError
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.profile.budgets import Allocation
from hkvprof.profile.costs import (
    FRESH,
    TURNOVER,
    DynamicLayout,
    Menu,
    Reads,
    fetched_share,
    fresh_items,
    most_read_bytes,
    read_bytes,
)
from hkvprof.profile.dealing import KNEE
from hkvprof.profile.planning import Rules, plan_anew, plan_scaled
from tests.profiles import make_profile

RATIOS = np.array([0.05, 0.1, 0.2, 0.5, 1.0], dtype=np.float32)
STRATEGIES = (
    Strategy(HeadType.STATIC, pool=7),
    Strategy(HeadType.DYNAMIC, index="mean", chunk=16),
    Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=64),
)
MENU = Menu(STRATEGIES, KeepRule(2, 4, 16), 8, 1000, 2)
SEARCH = settings(max_examples=50, deadline=None)


# What a head reads


def test_reads_by_hand() -> None:
    """Width 8, 2 bytes: 32 bytes a token. Mean, 20%: 9 hot chunks of 62 (test_forecast); projected:
    6400 - 6 * 32 - 994 * 4 = 2232 bytes are 62 hot tokens of 36; 64 more keys are compared."""
    assert fetched_share(MENU, STRATEGIES[0], 0.2) == Reads()
    found = fetched_share(MENU, STRATEGIES[1], 0.2)
    assert (found.expected, found.limit, found.worst) == pytest.approx(
        (TURNOVER * 9 * 16 / 1000, math.ceil(FRESH * 9) * 16 / 1000, 9 * 16 / 1000)
    )
    found = fetched_share(MENU, STRATEGIES[2], 0.2)
    assert (found.expected, found.limit, found.worst) == pytest.approx(
        ((TURNOVER * 62 + 32) / 1000, (math.ceil(FRESH * 62) + 32) / 1000, (62 + 32) / 1000)
    )
    assert fetched_share(MENU, STRATEGIES[2], 0.01) == Reads()  # does not fit
    assert fetched_share(MENU, STRATEGIES[2], 1.0) == Reads()  # everything is there
    half = Menu(STRATEGIES, MENU.keep, 8, 1000, 2, int8_host=True)  # 8 bytes and a scale of 2
    assert fetched_share(half, STRATEGIES[2], 0.2).worst == pytest.approx((62 + 32) / 1600)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 90), st.integers(0, 500))
@SEARCH
def test_no_item_is_read_that_is_hot(hot: int, items: int, rerank: int, fresh: int) -> None:
    assume(hot <= items)
    found = read_bytes(rerank, DynamicLayout(2, 4, items, 1, hot), 3, 5, fresh)
    assert found <= (items - hot) * 3 + min(hot, items - hot) * 8
    assert found <= most_read_bytes(rerank, 1, 3, 5, fresh)
    assert found == min(rerank, items - hot) * 3 + min(fresh, hot, items - hot) * 8


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0, 1))
@SEARCH
def test_one_item_at_least_may_become_hot_where_one_can(hot: int, items: int, part: float) -> None:
    assume(hot <= items)
    found = fresh_items(DynamicLayout(2, 4, items, 1, hot), part)
    assert found <= items - hot
    assert found >= min(1, items - hot)
    assert found >= min(part * hot - 1e-6, items - hot)


# Planning


def curves(seed: int, layers: int = 2, heads: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    loss = np.sort(rng.gamma(0.5, size=(3, layers, heads, 5)), axis=-1)[..., ::-1]
    loss[0] *= 2  # so that fetching pays
    loss[..., -1] = 0
    return loss.astype(np.float32)


def reads(plan: Allocation, what: str = "limit", menu: Menu = MENU) -> np.ndarray:
    pairs = zip(plan.strategy.flat, plan.ratio.flat, strict=True)
    found = [fetched_share(menu, menu.strategies[s], float(r)) for s, r in pairs]
    return np.array([getattr(one, what) for one in found])


def most_read(plan: Allocation, menu: Menu = MENU) -> float:
    """By the plan's own limits, as a share of all dense bytes; rows may grow."""
    total = 0.0
    decisions = zip(plan.strategy.flat, plan.ratio.flat, plan.limits.flat, strict=True)
    for number, ratio, fresh in decisions:
        strategy = menu.strategies[number]
        layout = menu.reading(strategy, float(ratio))
        if layout is not None:
            sizes = (menu.host_bytes, menu.host_bytes)
            total += most_read_bytes(strategy.rerank, layout.chunk, *sizes, int(fresh))
    return total / (menu.dense_bytes * plan.ratio.size)


shares = st.floats(0.05, 1)
fetches = st.one_of(st.just(0.0), st.floats(0, 0.12))


@given(st.integers(0, 2**32), shares, st.one_of(fetches, st.none()), st.floats(0, 1))
@SEARCH
def test_neither_budget_is_exceeded(
    seed: int, share: float, fetch: float | None, even: float
) -> None:
    plan = plan_anew(MENU, curves(seed), RATIOS, share, Rules(even), fetch=fetch)
    assert plan.ratio.astype(np.float64).mean() <= share + 1e-12
    if fetch is not None:
        assert most_read(plan) <= fetch * (1 + 1e-9)
        assert reads(plan).mean() <= fetch * (1 + 1e-9)
    for number, ratio in zip(plan.strategy.flat, plan.ratio.flat, strict=True):
        assert MENU.fits(STRATEGIES[number], float(ratio))


@given(st.integers(0, 2**32), shares, fetches, fetches, st.floats(0, 1))
@SEARCH
def test_more_reads_never_lose_more(
    seed: int, share: float, a: float, b: float, even: float
) -> None:
    less, more = (
        plan_anew(MENU, curves(seed), RATIOS, share, Rules(even), fetch=fetch)
        for fetch in sorted((a, b))
    )
    assert more.expected_loss <= less.expected_loss + 1e-9


@given(st.integers(0, 2**32), shares, shares, fetches)
@settings(max_examples=40, deadline=None)
def test_more_bytes_never_lose_more_than_the_change_of_one_head(
    seed: int, a: float, b: float, fetch: float
) -> None:
    """Changes are whole heads: the budget of reads may just not hold one. Without a limit, and
    without reads, not even that."""
    loss = curves(seed, 4, 6)
    less, more = (
        plan_anew(MENU, loss, RATIOS, share, Rules(0.0), fetch=fetch) for share in sorted((a, b))
    )
    own = loss[0].reshape(24, -1)
    change = float(np.interp(np.log(min(a, b)), np.log(RATIOS), own.max(axis=0)))
    assert more.expected_loss <= less.expected_loss + (change if fetch else 1e-6)


@given(st.integers(0, 2**32), shares)
@SEARCH
def test_without_reads_no_head_is_dynamic(seed: int, share: float) -> None:
    loss = curves(seed)
    plan = plan_anew(MENU, loss, RATIOS, share, Rules(0.5), fetch=0.0)
    static = Menu(STRATEGIES[:1], MENU.keep, 8, 1000, 2)
    alone = plan_anew(static, loss[:1], RATIOS, share, Rules(0.5))
    assert (reads(plan, "worst") == 0).all()
    assert plan.expected_loss <= alone.expected_loss + 1e-6


@given(st.integers(0, 2**32), shares, st.floats(0, 1))
@SEARCH
def test_unlimited_reads_change_nothing_of_a_plan_by_bytes(
    seed: int, share: float, even: float
) -> None:
    """Every head takes the strategy of the least loss at its ratio; ratios are those of the least
    curves (test_dealing)."""
    loss = curves(seed)
    plan = plan_anew(MENU, loss, RATIOS, share, Rules(even), fetch=math.inf)
    one = Menu(STRATEGIES[:1], MENU.keep, 8, 1000, 2)
    fits = np.array([[MENU.fits(s, float(r) * (1 - 1e-4)) for r in RATIOS] for s in STRATEGIES])
    least = np.where(fits[:, None, None], loss, 1e30).min(axis=0)[None].astype(np.float32)
    by_bytes = plan_anew(one, least, RATIOS, share, Rules(even))
    np.testing.assert_array_equal(plan.ratio, by_bytes.ratio)
    assert plan.fresh is None
    for layer, head in np.ndindex(2, 3):
        ratio = float(plan.ratio[layer, head])
        losses = [own_loss(s, loss[n, layer, head], ratio) for n, s in enumerate(STRATEGIES)]
        assert losses[plan.strategy[layer, head]] == pytest.approx(min(losses), rel=1e-4, abs=1e-5)


def own_loss(strategy: Strategy, curve: np.ndarray, ratio: float) -> float:
    """Linear in log ratio from the first measured ratio at which the strategy fits; else infinite.

    A ratio a ten-thousandth below a measured one counts as it, if only from there on it fits.
    """
    fits = np.array([MENU.fits(strategy, float(r)) for r in RATIOS])
    if not fits.any() or ratio < RATIOS[fits][0] * (1 - 1e-4):
        return np.inf
    return float(np.interp(np.log(ratio), np.log(RATIOS[fits]), curve[fits]))


@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.2, 0.5]), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_at_equal_ratios_a_plan_is_nearly_the_best_of_all(
    seed: int, share: float, part: int
) -> None:
    """Brute force over 3^5 choices where all bytes are dealt evenly. What is not used of the
    budget would not have paid for the next change, so that no more than that one is missed."""
    loss = curves(seed, 1, 5)
    full = plan_anew(MENU, loss, RATIOS, share, Rules(1.0), fetch=math.inf)
    fetch = float(reads(full).mean()) * part / 12
    plan = plan_anew(MENU, loss, RATIOS, share, Rules(1.0), fetch=fetch)
    ratio = float(plan.ratio[0, 0])
    assert (plan.ratio == plan.ratio[0, 0]).all()
    own = np.array([[own_loss(s, loss[n, 0, h], ratio) for n, s in enumerate(STRATEGIES)]
                    for h in range(5)]).clip(max=1e3)  # fmt: skip
    cost = np.array([fetched_share(MENU, strategy, ratio).limit for strategy in STRATEGIES])
    best = min(
        own[range(5), choice].sum()
        for choice in product(range(3), repeat=5)
        if cost[list(choice)].mean() <= fetch * (1 + 1e-12)
    )
    step = float((own[:, 0] - own.min(axis=1)).max())
    assert best - 1e-5 <= plan.expected_loss <= best + step + 1e-5
    relaxed = linprog(
        own.ravel(), A_ub=[np.tile(cost, 5)], b_ub=[fetch * 5],
        A_eq=np.kron(np.eye(5), np.ones(3)), b_eq=np.ones(5),
    )  # fmt: skip
    assert plan.expected_loss >= relaxed.fun - 1e-5


@given(st.integers(0, 2**32), st.floats(0.06, 0.9), st.floats(0, 1))
@SEARCH
def test_the_default_reads_less_and_loses_hardly_more(seed: int, share: float, even: float) -> None:
    loss = curves(seed, 3, 4)
    unlimited = plan_anew(MENU, loss, RATIOS, share, Rules(even), fetch=math.inf)
    knee = plan_anew(MENU, loss, RATIOS, share, Rules(even))
    assert knee.expected_loss <= unlimited.expected_loss * (1 + KNEE) + 1e-9
    assert reads(knee).sum() <= reads(unlimited).sum() + 1e-9
    given_it = plan_anew(MENU, loss, RATIOS, share, Rules(even), fetch=most_read(knee))
    assert given_it.expected_loss <= knee.expected_loss + 1e-9


@given(st.integers(0, 2**32), shares, fetches)
@example(0, 0.1, 0.0)
@settings(max_examples=50, deadline=None)
def test_the_order_of_heads_does_not_matter(seed: int, share: float, fetch: float) -> None:
    loss = curves(seed)
    order = np.random.default_rng(seed).permutation(6)
    moved = loss.reshape(3, 6, 5)[:, order].reshape(loss.shape)
    plain, other = (
        plan_anew(MENU, x, RATIOS, share, Rules(0.5), fetch=fetch) for x in (loss, moved)
    )
    for name in ("ratio", "strategy", "limits"):
        found = getattr(other, name).ravel()
        np.testing.assert_array_equal(found, getattr(plain, name).ravel()[order])


@given(st.integers(0, 2**32), shares, st.floats(0.001, 0.12))
@SEARCH
def test_what_a_budget_leaves_lets_more_items_become_hot(
    seed: int, share: float, fetch: float
) -> None:
    """FRESH of the hot ones at least; and no head could have another one beside the others."""
    plan = plan_anew(MENU, curves(seed), RATIOS, share, Rules(0.5), fetch=fetch)
    for number, ratio, fresh in zip(
        plan.strategy.flat, plan.ratio.flat, plan.limits.flat, strict=True
    ):
        layout = MENU.reading(STRATEGIES[number], float(ratio))
        if layout is not None:
            assert fresh >= fresh_items(layout, FRESH)


@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.2, 0.5]), st.floats(0, 1), st.integers(1, 40))
@example(0, 0.2, 1.0, 1)
@settings(max_examples=40, deadline=None)
def test_a_budget_at_a_measured_ratio_loses_no_more_than_a_millionth_above(
    seed: int, share: float, even: float, layers: int
) -> None:
    """0.2 is less than float32(0.2), and the sum over heads less by more; yet what fits at the
    measured ratio fits there."""
    loss = np.concatenate([curves(seed + i) for i in range(layers)], axis=1)
    at, above = (
        plan_anew(MENU, loss, RATIOS, s, Rules(even), fetch=math.inf)
        for s in (share, share * (1 + 1e-6))
    )
    assert at.expected_loss <= above.expected_loss * (1 + 1e-3)
    assert at.ratio.astype(np.float64).mean() <= share + 1e-12
    for number, ratio in zip(at.strategy.flat, at.ratio.flat, strict=True):
        assert MENU.fits(STRATEGIES[number], float(ratio))


def test_few_samples_do_not_decide_for_static_heads() -> None:
    """At a margin above every loss, heads are static only where the budget of reads forces them."""
    loss = curves(1)
    margin = np.full(loss[0].shape, 1e3, dtype=np.float32)
    assert (plan_anew(MENU, loss, RATIOS, 0.2, Rules(0.5), None, 0.02).strategy == 0).any()
    wary = plan_anew(MENU, loss, RATIOS, 0.2, Rules(0.5), margin)
    assert not (wary.strategy == 0).any()
    forced = plan_anew(MENU, loss, RATIOS, 0.2, Rules(0.5), margin, 0.0)
    assert (forced.strategy == 0).all()


def test_a_head_that_must_be_static_lets_no_other_be() -> None:
    """A margin of no proof at all on a head whose index does not fit says nothing of others."""
    loss = curves(2, 1, 4)
    loss[1:, 0, 0] = 1e30
    margin = np.full(loss[0].shape, 1e6, dtype=np.float32)
    plan = plan_anew(MENU, loss, RATIOS, 0.2, Rules(1.0), margin)
    assert plan.strategy[0, 0] == 0
    assert (plan.strategy[0, 1:] > 0).all()


def test_types_that_are_given_keep_within_a_budget_of_reads_or_say_why_not() -> None:
    types = np.array([[0, 2, 2]], dtype=np.uint8)
    base = np.full((1, 3), 0.2, dtype=np.float32)
    loss = np.zeros((3, 1, 3, 1), dtype=np.float32)
    args = (MENU, types, base, loss, np.ones(1, dtype=np.float32), 0.2)
    assert plan_scaled(*args).fresh is None
    plan = plan_scaled(*args, fetch=0.03)
    assert most_read(plan) <= 0.03
    assert plan.limits[0, 1] == plan.limits[0, 2] > 1
    with pytest.raises(BudgetError, match=r"its dynamic heads read at least \d+: raise fetch"):
        plan_scaled(*args, fetch=0.001)


def test_a_menu_that_always_reads_cannot_do_without() -> None:
    menu = Menu(STRATEGIES[1:], MENU.keep, 8, 1000, 2)
    with pytest.raises(BudgetError, match=r"read at least 0\.\d+ at this budget: raise fetch"):
        plan_anew(menu, curves(0)[1:], RATIOS, 0.2, fetch=0.0)


def test_a_profile_is_asked_in_every_way_that_reads_are_written() -> None:
    profile = make_profile()
    dense = 600 * profile.grid.token_bytes(2)
    share = profile.allocation(0.5, 600, fetch=0.05)
    for same in ("5%", f"{0.05 * dense:.0f}b", 0.05):
        found = profile.allocation(0.5, 600, fetch=same)
        np.testing.assert_array_equal(found.strategy, share.strategy)
        np.testing.assert_array_equal(found.limits, share.limits)
    assert profile.allocation(0.5, 600, fetch="unlimited").fresh is None
    assert profile.allocation(0.5, 600).fresh is not None
    with pytest.raises(BudgetError, match="is not understood"):
        profile.allocation(0.5, 600, fetch="much")


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_rules_out_of_range_are_refused(wrong: float) -> None:
    with pytest.raises(UsageError, match="must lie in"):
        Rules(wrong)
