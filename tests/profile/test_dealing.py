"""Budgets dealt out over heads: bounds that hold for any curves, and optima of small cases."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from hkvprof.errors import BudgetError
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.dealing import allocate, losses_of, scale_ratios

RATIOS = np.array([0.02, 0.05, 0.1, 0.2, 0.5, 1.0], dtype=np.float32)
SEARCH = settings(max_examples=200, deadline=None)


@st.composite
def curves(draw: st.DrawFn) -> np.ndarray:
    """Loss of 1 to 3 strategies, 1 to 2 layers, 1 to 3 heads; the first fits everywhere."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3)), 6)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    loss = rng.gamma(0.5, size=shape).astype(np.float32)
    if draw(st.booleans()):
        loss = np.sort(loss, axis=-1)[..., ::-1].copy()
    loss[1:, ..., : draw(st.integers(0, 3))] = INFEASIBLE
    return loss


shares = st.floats(0.02, 1.0)


@given(curves(), shares, st.floats(1e-4, 0.02))
@SEARCH
def test_never_over_the_budget_and_never_below_the_floor(
    loss: np.ndarray, share: float, floor: float
) -> None:
    plan = allocate(loss, RATIOS, share, floor)
    ratio = plan.ratio.astype(np.float64)
    assert ratio.mean() <= share + 1e-12
    assert (ratio >= floor * (1 - 1e-6)).all()
    assert (ratio <= 1).all()
    assert plan.strategy.max() < len(loss)
    assert np.isfinite(plan.expected_loss)


@given(curves(), shares, shares)
@SEARCH
def test_more_budget_never_takes_from_a_head(loss: np.ndarray, a: float, b: float) -> None:
    less, more = (allocate(loss, RATIOS, share, 0.01) for share in sorted((a, b)))
    assert (more.ratio >= less.ratio - 1e-7).all()
    assert more.expected_loss <= less.expected_loss + 1e-5 * (1 + abs(less.expected_loss))


@given(curves(), st.floats(0.021, 1))
@SEARCH
def test_no_head_gets_a_strategy_that_does_not_fit(loss: np.ndarray, share: float) -> None:
    plan = allocate(loss, RATIOS, share, float(RATIOS[0]))
    for layer, head in np.ndindex(plan.ratio.shape):
        below = int(np.searchsorted(RATIOS, plan.ratio[layer, head] * (1 + 1e-6), "right")) - 1
        chosen = plan.strategy[layer, head]
        assert chosen == 0 or (below >= 0 and loss[chosen, layer, head, below] < INFEASIBLE)


@given(st.integers(0, 2**32), st.integers(2, 3))
@settings(max_examples=60, deadline=None)
def test_equals_brute_force_on_convex_curves(seed: int, heads: int) -> None:
    """On ratios of equal steps and convex curves, buying by slope is optimal at grid points."""
    ratios = np.array([0.25, 0.5, 0.75, 1.0], dtype=np.float32)
    rng = np.random.default_rng(seed)
    drops = np.sort(rng.uniform(0.1, 1, size=(heads, 3)), axis=1)[:, ::-1]
    curve = np.concatenate([drops[:, ::-1].cumsum(1)[:, ::-1], np.zeros((heads, 1))], axis=1)
    loss = curve.astype(np.float32)[None, None]
    steps = rng.integers(heads, 4 * heads + 1)
    share = float(steps) * 0.25 / heads
    plan = allocate(loss, ratios, share, 0.25)
    best = min(
        sum(curve[head, step] for head, step in enumerate(choice))
        for choice in product(range(4), repeat=heads)
        if sum(choice) + heads <= steps
    )
    assert plan.expected_loss == pytest.approx(best, rel=1e-5, abs=1e-6)


def hull_at(curve: np.ndarray, grid: np.ndarray, at: float) -> float:
    """The lower convex hull at an abscissa: the least of all chords that span it."""
    spans = [(i, j) for i, j in product(range(len(grid)), repeat=2) if grid[i] <= at <= grid[j]]
    return min(np.interp(at, grid[[i, j]], curve[[i, j]]) for i, j in spans)


@given(curves(), st.floats(0.03, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_what_is_not_dealt_evenly_is_spent_best(
    loss: np.ndarray, share: float, even: float
) -> None:
    """Against linear programming over mixtures of grid points: no other ratios of which none lies
    below the even part have a lower convexified loss within the budget."""
    ratios = RATIOS.astype(np.float64)
    plan = allocate(loss, RATIOS, share, float(ratios[0]), even)
    ratio = plan.ratio.astype(np.float64).ravel()
    floor = max(ratios[0], even * share)
    assert ratio.mean() <= share + 1e-12
    assert ratio.min() >= floor * (1 - 1e-6)
    best = np.minimum.accumulate(loss.min(axis=0).reshape(len(ratio), -1), axis=1).astype(float)
    heads, points = best.shape
    kept = np.kron(np.eye(heads), ratios)
    found = linprog(
        best.ravel(),
        A_ub=np.vstack([-kept, kept.sum(axis=0)]),
        b_ub=np.append(np.full(heads, -floor), share * heads),
        A_eq=np.kron(np.eye(heads), np.ones(points)),
        b_eq=np.ones(heads),
    )
    assert found.success
    ours = sum(hull_at(c, ratios, max(r, ratios[0])) for c, r in zip(best, ratio, strict=True))
    assert ours == pytest.approx(found.fun, rel=1e-5, abs=1e-5)


@given(curves(), shares, shares, st.floats(0, 1))
@SEARCH
def test_with_an_even_part_more_budget_never_takes_from_a_head(
    loss: np.ndarray, a: float, b: float, even: float
) -> None:
    less, more = (allocate(loss, RATIOS, share, 0.01, even) for share in sorted((a, b)))
    assert (more.ratio >= less.ratio - 1e-7).all()
    assert more.expected_loss <= less.expected_loss + 1e-5 * (1 + abs(less.expected_loss))


@given(st.integers(0, 2**32), shares)
@settings(max_examples=40, deadline=None)
def test_all_evenly_is_the_same_for_every_head(seed: int, share: float) -> None:
    loss = np.random.default_rng(seed).gamma(0.5, size=(2, 1, 3, 6)).astype(np.float32)
    assert np.allclose(allocate(loss, RATIOS, share, 0.01, 1.0).ratio, share)


def is_vertex(curve: np.ndarray, at: int) -> bool:
    """Whether a point lies strictly below every chord that spans it."""
    spans = product(range(at), range(at + 1, len(curve)))
    return all(curve[at] < np.interp(at, [i, j], [curve[i], curve[j]]) for i, j in spans)


def test_equals_brute_force_wherever_no_segment_is_cut() -> None:
    """Buying hull segments is optimal for any curves and menus at the budgets it spends exactly.

    Everett's theorem (Operations Research, 1963): where every head ends on a vertex of its hull,
    brute force over strategies and grid ratios finds nothing better within the same bytes.
    """
    ratios = np.arange(1, 9, dtype=np.float32) / 8  # exact, as are sums of steps
    checked = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        loss = rng.gamma(0.5, size=(2, 1, 2, 8)).astype(np.float32)
        loss[1, ..., : rng.integers(0, 3)] = INFEASIBLE
        steps = int(rng.integers(2, 17))
        plan = allocate(loss, ratios, steps / 16, 1 / 8)
        taken = plan.ratio.astype(np.float64).ravel() * 8
        points = taken.round().astype(int) - 1
        envelope = np.minimum.accumulate(loss.min(axis=0)[0], axis=-1)
        on_vertices = all(is_vertex(c, at) for c, at in zip(envelope, points, strict=True))
        if np.abs(taken - taken.round()).max() > 1e-5 or not on_vertices:
            continue
        checked += 1
        best = min(
            sum(float(loss[s, 0, h, r]) for h, (s, r) in enumerate(choice))
            for choice in product(product(range(2), range(8)), repeat=2)
            if sum(r + 1 for _, r in choice) <= steps
        )
        assert plan.expected_loss == pytest.approx(best, rel=1e-4, abs=1e-6), seed
    assert checked >= 40


@given(st.integers(0, 2**32), shares, st.sampled_from([0.0, 0.5]))
@SEARCH
def test_the_order_of_heads_does_not_matter(seed: int, share: float, even: float) -> None:
    rng = np.random.default_rng(seed)
    loss = np.sort(rng.gamma(0.5, size=(3, 2, 4, 6)), axis=-1)[..., ::-1].astype(np.float32)
    loss[1:, ..., : rng.integers(0, 3)] = INFEASIBLE
    order = rng.permutation(8)
    moved = loss.reshape(3, 8, 6)[:, order].reshape(loss.shape)
    plain, permuted = (allocate(curves, RATIOS, share, 0.01, even) for curves in (loss, moved))
    np.testing.assert_array_equal(permuted.ratio.ravel(), plain.ratio.ravel()[order])
    np.testing.assert_array_equal(permuted.strategy.ravel(), plain.strategy.ravel()[order])
    assert permuted.expected_loss == pytest.approx(plain.expected_loss, rel=1e-12)


@given(curves(), shares)
@SEARCH
def test_losses_of_heads_sum_to_the_expected_loss(loss: np.ndarray, share: float) -> None:
    plan = allocate(loss, RATIOS, share, 0.02)
    assert plan.head_loss is not None
    assert plan.head_loss.sum() == pytest.approx(plan.expected_loss, rel=1e-12)
    again = losses_of(loss, RATIOS, plan.strategy, plan.ratio)
    np.testing.assert_allclose(again, plan.head_loss, rtol=1e-4, atol=1e-6)


def test_losses_of_given_strategies() -> None:
    """Linear in the logarithm of the ratio; NaN where a strategy did not fit."""
    loss = np.zeros((2, 1, 3, 6), np.float32)
    loss[0, ..., :] = [6, 5, 4, 2, 1, 0]
    loss[1, ..., :] = [INFEASIBLE, INFEASIBLE, 3, 2, 1, 0]
    ratio = np.array([[0.1, np.sqrt(0.1 * 0.2), 0.06]], np.float32)
    found = losses_of(loss, RATIOS, np.array([[1, 0, 1]], np.uint8), ratio)
    np.testing.assert_allclose(found, [[3, 3, np.nan]], rtol=1e-6)


def test_a_head_whose_strategies_all_need_more_raises() -> None:
    loss = np.full((1, 1, 2, 6), 0.5, np.float32)
    loss[..., :3] = INFEASIBLE
    with pytest.raises(BudgetError, match="no strategy of some heads fits"):
        allocate(loss, RATIOS, 0.1, 0.02)
    assert allocate(loss, RATIOS, 0.201, 0.02).ratio.min() == RATIOS[3]


def test_the_whole_budget_is_spent_where_it_helps() -> None:
    loss = np.stack([np.linspace(1, 0, 6), np.linspace(5, 0, 6)]).astype(np.float32)[None, None]
    plan = allocate(loss, RATIOS, 0.3, 0.02)
    assert plan.ratio.mean() == pytest.approx(0.3, rel=1e-5)
    assert plan.ratio[0, 1] > plan.ratio[0, 0]


def test_a_share_of_one_keeps_everything() -> None:
    loss = np.zeros((2, 3, 4, 6), dtype=np.float32)
    assert (allocate(loss, RATIOS, 1.0, 0.01).ratio == 1).all()


def test_a_budget_below_the_floor_says_how_much_is_needed() -> None:
    with pytest.raises(BudgetError, match=r"budget 0\.05 is too small.*need 0\.1 "):
        allocate(np.zeros((1, 1, 1, 6), np.float32), RATIOS, 0.05, 0.1)
    with pytest.raises(BudgetError, match="too small"):
        scale_ratios(np.full((1, 1), 0.1, np.float32), 0.05, 0.1)


@given(st.integers(0, 2**32), shares, st.floats(1e-4, 0.02))
@SEARCH
def test_scaling_keeps_budget_floor_and_order(seed: int, share: float, floor: float) -> None:
    base = np.random.default_rng(seed).uniform(0.01, 1, size=(2, 3)).astype(np.float32)
    ratio = scale_ratios(base, share, floor)
    wide = ratio.astype(np.float64)
    assert wide.mean() <= share + 1e-12
    assert wide.mean() >= share * 0.99 or (wide >= 0.999).all()
    assert (wide >= floor * (1 - 1e-6)).all()
    assert (wide <= 1).all()
    assert (np.diff(ratio.flat[np.argsort(base, axis=None)]) >= -1e-6).all()
