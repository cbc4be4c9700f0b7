"""What a plan reads from the host, and planning that counts it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hkvprof.errors import UsageError
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.profile.costs import TURNOVER, Menu, fetched_share
from hkvprof.profile.planning import Rules, plan_anew

RATIOS = np.array([0.05, 0.1, 0.2, 0.5, 1.0], dtype=np.float32)
STRATEGIES = (
    Strategy(HeadType.STATIC, pool=7),
    Strategy(HeadType.DYNAMIC, index="mean", chunk=16),
    Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=64),
)
MENU = Menu(STRATEGIES, KeepRule(2, 4, 16), 8, 1000, 2)


def test_bytes_fetched_by_hand() -> None:
    """Width 8, 2 bytes: 32 bytes a token. Mean, 20%: 9 hot chunks of 62 (test_forecast); projected:
    6400 - 6 * 32 - 994 * 4 = 2232 bytes are 62 hot tokens of 36; reranking reads 126 keys."""
    assert fetched_share(MENU, STRATEGIES[0], 0.2) == 0
    assert fetched_share(MENU, STRATEGIES[1], 0.2) == pytest.approx(TURNOVER * 9 * 16 / 1000)
    expected = (TURNOVER * 62 + 126 / 2) / 1000
    assert fetched_share(MENU, STRATEGIES[2], 0.2) == pytest.approx(expected)
    assert fetched_share(MENU, STRATEGIES[2], 0.01) == 0  # does not fit
    assert fetched_share(MENU, STRATEGIES[2], 1.0) == 0  # everything is there


def curves(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.sort(rng.gamma(0.5, size=(3, 2, 3, 5)), axis=-1)[..., ::-1].astype(np.float32)


def fetched(strategy: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    pairs = zip(strategy.flat, ratio.flat, strict=True)
    return np.array([fetched_share(MENU, STRATEGIES[s], float(r)) for s, r in pairs])


weights = st.floats(0, 100)


@given(st.integers(0, 2**32), st.floats(0.05, 1), weights, weights)
@settings(max_examples=150, deadline=None)
def test_a_larger_weight_never_fetches_more(seed: int, share: float, a: float, b: float) -> None:
    """Bytes stay within the budget; head by head nothing more is read, nor less lost."""
    loss = curves(seed)
    less, more = (
        plan_anew(MENU, loss, RATIOS, share, Rules(0.5, weight)) for weight in sorted((a, b))
    )
    np.testing.assert_array_equal(less.ratio, more.ratio)
    assert more.ratio.astype(np.float64).mean() <= share + 1e-12
    before, after = (fetched(plan.strategy, plan.ratio) for plan in (less, more))
    assert (after <= before + 1e-6).all()
    assert more.head_loss is not None
    assert less.head_loss is not None
    assert (more.head_loss >= less.head_loss - 1e-6).all()


def own_loss(strategy: Strategy, curve: np.ndarray, ratio: float) -> float:
    """Linear in log ratio from the first measured ratio at which the strategy fits; else infinite.

    A ratio a ten-thousandth below a measured one counts as it, if only from there on it fits.
    """
    fits = np.array([strategy.index is None or MENU.fits(strategy, float(r)) for r in RATIOS])
    if not fits.any() or ratio < RATIOS[fits][0] * (1 - 1e-4):
        return np.inf
    return float(np.interp(np.log(ratio), np.log(RATIOS[fits]), curve[fits]))


@given(st.integers(0, 2**32), st.floats(0.05, 0.99), weights)
@example(2**32, 0.2, 0.001)
@example(2**32, float(np.float32(0.1)), 0.001)
@example(0, 0.1, 100.0)
@settings(max_examples=100, deadline=None)
def test_every_head_takes_the_cheapest_strategy_at_its_ratio(
    seed: int, share: float, weight: float
) -> None:
    """Against all strategies: loss by interpolation, and the bytes of the layout."""
    loss = curves(seed)
    plan = plan_anew(MENU, loss, RATIOS, share, Rules(0.5, weight))
    for layer, head in np.ndindex(2, 3):
        ratio = float(plan.ratio[layer, head])
        costs = [
            own_loss(strategy, loss[number, layer, head], ratio)
            + weight * fetched_share(MENU, strategy, ratio)
            for number, strategy in enumerate(STRATEGIES)
        ]
        assert costs[plan.strategy[layer, head]] == pytest.approx(min(costs), rel=1e-4, abs=1e-5)


@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.2, 0.5]), st.floats(0, 1), st.integers(1, 40))
@example(0, 0.2, 1.0, 1)
@settings(max_examples=60, deadline=None)
def test_a_budget_at_a_measured_ratio_loses_no_more_than_a_millionth_above(
    seed: int, share: float, even: float, layers: int
) -> None:
    """0.2 is less than float32(0.2), and the sum over heads less by more; yet what fits at the
    measured ratio fits there."""
    loss = np.concatenate([curves(seed + i) for i in range(layers)], axis=1)
    at, above = (plan_anew(MENU, loss, RATIOS, s, Rules(even)) for s in (share, share * (1 + 1e-6)))
    assert at.expected_loss <= above.expected_loss * (1 + 1e-3)
    assert at.ratio.astype(np.float64).mean() <= share + 1e-12
    for number, ratio in zip(at.strategy.flat, at.ratio.flat, strict=True):
        assert MENU.fits(STRATEGIES[number], float(ratio))


@given(st.integers(0, 2**32), st.floats(0.05, 1))
@settings(max_examples=50, deadline=None)
def test_without_weight_nothing_changes(seed: int, share: float) -> None:
    loss = curves(seed)
    plain, weighed = (
        plan_anew(MENU, loss, RATIOS, share, r) for r in (Rules(0.5), Rules(0.5, 0.0))
    )
    np.testing.assert_array_equal(plain.strategy, weighed.strategy)
    np.testing.assert_array_equal(plain.ratio, weighed.ratio)


@given(st.integers(0, 2**32), st.floats(0.05, 1), weights)
@settings(max_examples=50, deadline=None)
def test_the_order_of_heads_does_not_matter(seed: int, share: float, weight: float) -> None:
    loss = curves(seed)
    order = np.random.default_rng(seed).permutation(6)
    moved = loss.reshape(3, 6, 5)[:, order].reshape(loss.shape)
    plain, other = (plan_anew(MENU, x, RATIOS, share, Rules(0.5, weight)) for x in (loss, moved))
    np.testing.assert_array_equal(other.ratio.ravel(), plain.ratio.ravel()[order])
    np.testing.assert_array_equal(other.strategy.ravel(), plain.strategy.ravel()[order])


@pytest.mark.parametrize(
    "wrong", [{"even": -0.1}, {"even": 1.1}, {"even": float("nan")}, {"transfer_weight": -1.0},
              {"transfer_weight": float("inf")}],
)  # fmt: skip
def test_rules_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="must lie in"):
        Rules(**wrong)
