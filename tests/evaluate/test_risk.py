"""Exact tests of a risk by their definition, and that certificates are wrong as rarely as said."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.errors import BudgetError, UsageError
from hkvprof.evaluate.certify import Claim
from hkvprof.profile.certificate import MOST_ALPHA, MOST_DELTA, Level, fixed_sequence

ALPHA, DELTA = 0.05, 0.1
BUDGETS = (0.5, 0.3, 0.2, 0.1, 0.05)
CALIBRATIONS = 4000


def tail(losses: int, samples: int, alpha: Fraction) -> Fraction:
    """P(Bin(samples, alpha) <= losses), exactly."""
    return sum(
        (comb(samples, i) * alpha**i * (1 - alpha) ** (samples - i) for i in range(losses + 1)),
        Fraction(0),
    )


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 50))
def test_p_values_are_the_binomial_tail(samples: int, losses: int, percent: int) -> None:
    losses = min(losses, samples)
    claim = Claim(percent / 100, 0.05, (0.1,))
    exact = float(tail(losses, samples, Fraction(percent, 100)))
    assert claim.p_value(losses, samples) == pytest.approx(exact, rel=1e-9)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 50), st.integers(1, 20))
def test_the_most_losses_are_the_most_that_pass(samples: int, alpha: int, delta: int) -> None:
    claim = Claim(alpha / 100, delta / 100, (0.1,))
    most = claim.most_losses(samples)
    assert most == -1 or claim.p_value(most, samples) <= claim.delta
    assert claim.p_value(most + 1, samples) > claim.delta
    assert (most == -1) == (samples < claim.needed)


@pytest.mark.parametrize(
    ("alpha", "delta", "needed"), [(0.02, 0.05, 149), (0.05, 0.05, 59), (0.01, 0.1, 230)]
)
def test_how_many_samples_it_takes(alpha: float, delta: float, needed: int) -> None:
    claim = Claim(alpha, delta, (0.1,))
    assert claim.needed == needed
    assert (1 - alpha) ** needed <= delta < (1 - alpha) ** (needed - 1)
    claim.check_samples(needed)
    with pytest.raises(UsageError, match=rf"{needed - 1} .*too few.* at least {needed}"):
        claim.check_samples(needed - 1)


def test_samples_of_unequal_risk_stay_within_the_theorem() -> None:
    """Hoeffding's bound holds from one below the mean down: no claim leaves that range."""
    for alpha in np.linspace(0.005, MOST_ALPHA, 40):
        claim = Claim(float(alpha), MOST_DELTA, (0.1,))
        for samples in (claim.needed, claim.needed + 1, 3 * claim.needed, 500):
            assert claim.most_losses(samples) <= samples * alpha - 1 + 1e-9


def wrong_share(risks: list[float], samples: int, dependent: bool, spread: float = 0.0) -> float:
    """Share of simulated certificates at a budget whose true risk is above ALPHA.

    `dependent`: one uniform number per sample decides at all budgets, as samples that are hard are
    hard everywhere. `spread`: risks of the samples (fixed, as tasks are) differ by as much.
    """
    random = np.random.default_rng(0)
    claim = Claim(ALPHA, DELTA, BUDGETS)
    own = np.repeat(np.linspace(1 - spread, 1 + spread, 5), samples // 5)
    per_sample = np.array(risks)[:, None] * own
    p_values = [claim.p_value(count, samples) for count in range(samples + 1)]
    wrong = 0
    for _ in range(CALIBRATIONS):
        shape = (1, samples) if dependent else (len(risks), samples)
        losses = (random.random(shape) < per_sample).sum(axis=1).tolist()
        levels = [
            Level(budget, samples, count, p_values[count])
            for budget, count in zip(BUDGETS, losses, strict=True)
        ]
        certified = fixed_sequence(levels, samples, DELTA)
        wrong += certified is not None and risks[BUDGETS.index(certified)] > ALPHA
    return wrong / CALIBRATIONS


ABOVE = ALPHA + 1e-4


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize(
    "risks",
    [
        [ABOVE] * 5,  # every budget is just too risky
        [0.0, 0.0, 0.0, 0.0, ABOVE],  # only the last is
        [0.0, ABOVE, 0.0, ABOVE, 0.0],  # not monotone: a safe budget beyond a risky one
        [0.01, 0.03, ABOVE, 0.08, 0.2],
        [0.2, 0.001, 0.0, 0.0, ABOVE],
    ],
)
def test_certificates_are_wrong_at_most_as_often_as_promised(
    risks: list[float], dependent: bool
) -> None:
    room = 3 * np.sqrt(DELTA * (1 - DELTA) / CALIBRATIONS)
    assert wrong_share(risks, 150, dependent) <= DELTA + room


def test_the_promise_is_used_up_where_risk_is_just_above() -> None:
    """Else the test above would pass for a rule that never certifies."""
    exact = Claim(ALPHA, DELTA, BUDGETS)
    size = exact.p_value(exact.most_losses(150), 150)
    assert wrong_share([ABOVE] * 5, 150, False) == pytest.approx(size, abs=0.015)


def test_tasks_of_unequal_risk_are_covered() -> None:
    room = 3 * np.sqrt(DELTA * (1 - DELTA) / CALIBRATIONS)
    for spread in (0.5, 1.0):
        assert wrong_share([ABOVE] * 5, 150, True, spread) <= DELTA + room


def test_taking_the_best_of_all_budgets_would_break_the_promise() -> None:
    """What the fixed sequence is for: without it five risky budgets have five chances."""
    claim, random = Claim(ALPHA, DELTA, BUDGETS), np.random.default_rng(1)
    losses = random.binomial(150, ABOVE, (CALIBRATIONS, 5))
    assert (losses.min(axis=1) <= claim.most_losses(150)).mean() > 2 * DELTA


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"alpha": 0.0}, UsageError, "alpha is 0: expected a share in"),
        ({"alpha": 0.6}, UsageError, "alpha is 0.6"),
        ({"delta": 0.3}, UsageError, "delta is 0.3"),
        ({"loss": "vibes"}, UsageError, "answers .*agreement"),
        ({"budgets": ()}, BudgetError, "no budget"),
        ({"budgets": (1.0, 0.5)}, BudgetError, "a budget of 1 cannot be certified"),
        ({"budgets": (0.1, 0.5)}, BudgetError, "must fall"),
    ],
)
def test_claims_that_make_no_sense(change: dict, error: type[Exception], said: str) -> None:
    known = {"alpha": 0.02, "delta": 0.05, "budgets": (0.5, 0.1)}
    with pytest.raises(error, match=said):
        Claim(**{**known, **change})
