"""What is usual: every sample against all others, and how often a new one is called unusual."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hkvprof.errors import ProfileError
from hkvprof.profile.domain import FLOOR, LEAST_SAMPLES, Domain, deviations


def figure(sample: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """The largest deviation, by the textbook: a new sample's prediction interval."""
    count = len(others)
    worst = 0.0
    for column in range(others.shape[1]):
        mean = sum(others[:, column]) / count
        spread = math.sqrt(sum((others[:, column] - mean) ** 2) / (count - 1))
        width = max(spread, FLOOR) * math.sqrt(1 + 1 / count)
        worst = max(worst, abs(sample[column] - mean) / width)
    return worst


def skewed(random: np.random.Generator, *shape: int) -> NDArray[np.float64]:
    """As sparsities are: near 1, with a long tail below."""
    return 1 - 0.2 * random.beta(0.5, 4, shape)


@settings(deadline=None)
@given(st.integers(LEAST_SAMPLES, 30), st.integers(1, 5), st.integers(0, 1000))
def test_the_bound_is_the_largest_of_all_samples_against_the_others(
    samples: int, heads: int, seed: int
) -> None:
    drawn = skewed(np.random.default_rng(seed), samples, heads)
    figures = [figure(drawn[i], np.delete(drawn, i, axis=0)) for i in range(samples)]
    domain = Domain.of(drawn.reshape(samples, 1, heads), has_context=False)
    assert domain.bound == pytest.approx(max(figures), abs=0.0101)
    assert domain.bound >= max(figures) - 1e-9
    assert domain.false_alarms == pytest.approx(1 / (samples + 1), abs=1e-4)


def test_with_many_samples_one_in_a_hundred_is_unusual() -> None:
    drawn = skewed(np.random.default_rng(0), 500, 3)
    domain = Domain.of(drawn, has_context=False)
    figures = sorted(figure(drawn[i], np.delete(drawn, i, axis=0)) for i in range(500))
    assert domain.bound == pytest.approx(figures[495], abs=0.0101)
    assert domain.false_alarms <= 0.01


def test_false_alarms_are_as_rare_as_said_whatever_the_distribution() -> None:
    random = np.random.default_rng(3)
    alarms = total = 0
    for _ in range(300):
        drawn = skewed(random, 60, 20)
        domain = Domain.of(drawn, has_context=False)
        fresh = skewed(random, 40, 20)
        moved = deviations(fresh, drawn.mean(axis=0), drawn.std(axis=0), 60).max(axis=1)
        alarms, total = alarms + int((moved > domain.bound).sum()), total + 40
    assert domain.false_alarms == pytest.approx(1 / 61, abs=1e-4)
    assert 0.4 / 61 < alarms / total < 1.4 / 61


def test_what_is_calm_has_a_least_width() -> None:
    """Heads that never move are not called unusual for the last digit."""
    calm = np.full((20, 4), 0.99)
    domain = Domain.of(calm, has_context=False)
    assert domain.bound <= 0.01  # rounded up
    moved = deviations(np.full(4, 0.98), calm.mean(0), calm.std(0), 20)
    assert moved == pytest.approx(0.01 / FLOOR / math.sqrt(1 + 1 / 20))


def test_what_cannot_be_compared_says_why() -> None:
    few = Domain.of(np.ones((LEAST_SAMPLES - 1, 2)), has_context=False)
    assert f"fewer than {LEAST_SAMPLES}" in few.reason
    assert "context" in Domain.of(np.ones((50, 2)), has_context=True).reason
    for domain in (few, Domain.of(np.eye(20), has_context=False)):
        assert Domain.from_json(domain.to_json()) == domain


@pytest.mark.parametrize(
    "data",
    [
        None, [], {"samples": 3}, {"samples": 3, "reason": "", "more": 1},
        {"samples": 0, "bound": 1.0, "false_alarms": 0.1, "reason": ""},
        {"samples": 9, "bound": float("inf"), "false_alarms": 0.1, "reason": ""},
        {"samples": 9, "bound": 1.0, "false_alarms": 2.0, "reason": ""},
        {"samples": True, "bound": 1.0, "false_alarms": 0.1, "reason": ""},
    ],
)  # fmt: skip
def test_records_that_are_not_sound_are_refused(data: object) -> None:
    with pytest.raises(ProfileError, match=r"provenance\.domain: expected"):
        Domain.from_json(data)
