"""Planning promises nothing that was not measured, at a prompt length and between lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.planning import Menu, loss_between, plan_anew
from tests.profiles import make_profile

RATIOS = np.array([0.01, 0.05, 0.1, 0.3, 1.0], dtype=np.float32)
STATIC = Strategy(HeadType.STATIC)


def curves(heads: int) -> np.ndarray:
    """One strategy; head i loses i times as much, all the same below 5%."""
    shape = np.array([1.0, 1.0, 0.5, 0.1, 0.0])
    return (np.arange(1, heads + 1)[:, None] * shape).astype(np.float32)[None, None]


@pytest.mark.parametrize("tokens", [1_000, 32_768, 1_000_000])
@pytest.mark.parametrize("share", [0.01, 0.03, 0.1])
def test_no_head_falls_below_the_first_measured_ratio(tokens: int, share: float) -> None:
    menu = Menu((STATIC,), KeepRule(2, 4, 16), 64, tokens, 2)
    ratio = plan_anew(menu, curves(8), RATIOS, share).ratio
    assert ratio.min() >= np.float32(0.01) * (1 - 1e-6)
    assert ratio.astype(float).mean() <= share + 1e-9


def test_a_budget_below_the_first_ratio_is_shared_evenly() -> None:
    menu = Menu((STATIC,), KeepRule(2, 4, 16), 64, 32_768, 2)
    ratio = plan_anew(menu, curves(8), RATIOS, 0.004).ratio
    assert np.allclose(ratio, 0.004)


def test_on_short_prompts_the_floor_in_tokens_decides() -> None:
    menu = Menu((STATIC,), KeepRule(2, 4, 16), 64, 200, 2)
    ratio = plan_anew(menu, curves(8), RATIOS, 0.06).ratio
    assert ratio.min() >= 7 / 200


SEARCH = settings(max_examples=100, deadline=None)
LENGTHS = np.array([100, 200, 1600])


def losses(seed: int) -> np.ndarray:
    """[3 lengths, 2 strategies, 1 layer, 2 heads, 4 ratios], some points infeasible."""
    rng = np.random.default_rng(seed)
    loss = rng.gamma(0.5, size=(3, 2, 1, 2, 4)).astype(np.float32)
    return np.where(rng.random(loss.shape) < 0.2, INFEASIBLE, loss)


@given(st.integers(0, 2**32), st.integers(1, 5000))
@SEARCH
def test_each_point_is_linear_in_log_length(seed: int, tokens: int) -> None:
    """numpy.interp over the lengths at which the point counts; clamped at both ends."""
    loss = losses(seed)
    found = loss_between(loss, LENGTHS, tokens)
    assert found.dtype == np.float32
    first = max(0, int(np.searchsorted(LENGTHS, tokens, "right")) - 1)
    last = min(len(LENGTHS) - 1, int(np.searchsorted(LENGTHS, tokens, "left")))
    around = [first, last] if tokens > LENGTHS[0] else [0]
    for place in np.ndindex(*found.shape):
        known = [a for a in around if loss[(a, *place)] < INFEASIBLE]
        expected = float(INFEASIBLE)
        if known:
            at = np.log(LENGTHS[known])
            expected = np.interp(np.log(tokens), at, [float(loss[(a, *place)]) for a in known])
        assert found[place] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("at", range(3))
def test_at_a_measured_length_its_curves_come_back(at: int) -> None:
    loss = losses(7)
    assert (loss >= INFEASIBLE).any()
    np.testing.assert_array_equal(loss_between(loss, LENGTHS, int(LENGTHS[at])), loss[at])


@pytest.mark.parametrize("tokens", [1, 10**9])
def test_one_length_is_for_all(tokens: int) -> None:
    loss = losses(3)[:1]
    np.testing.assert_array_equal(loss_between(loss, LENGTHS[:1], tokens), loss[0])


@given(st.floats(0.1, 1), st.lists(st.integers(150, 3000), min_size=2, max_size=4))
@SEARCH
def test_a_longer_prompt_is_expected_to_lose_what_lies_between(
    share: float, tokens: list[int]
) -> None:
    """The curves of make_profile lose half as much again at 1024 tokens as at 256."""
    profile = make_profile()
    small, large = (loss_between(profile.loss, profile.lengths, n) for n in (256, 1024))
    for n in tokens:
        here = profile.loss_at(n)
        fits = here < INFEASIBLE
        assert (here[fits] >= small[fits]).all()
        assert (here[fits] <= large[fits]).all()
        plan = profile.allocation(share, n)
        assert plan.ratio.astype(np.float64).mean() <= share + 1e-12
