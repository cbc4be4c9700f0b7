"""Means of the worst samples, against sorting and counting by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.calibration.evidence import Decision, Evidence
from hkvprof.calibration.merge import build_profile
from hkvprof.calibration.risk import Ranked, Risk
from hkvprof.errors import UsageError
from hkvprof.profile.budgets import INFEASIBLE
from tests.calibration.made_rows import CONDITIONS, DECISION, make_rows

SEARCH = settings(max_examples=80, deadline=None)
CVAR = replace(DECISION, risk=Risk("cvar", 0.8))


def worst(values: np.ndarray, weights: np.ndarray, level: float) -> float:
    """Take from the largest on until 1 - level of all weight is taken."""
    room = total = (1 - level) * float(weights.sum())
    mean = 0.0
    for value, weight in sorted(zip(values.tolist(), weights.tolist(), strict=True), reverse=True):
        taken = min(room, weight)
        mean += taken * value
        room -= taken
    return mean / total if total else 0.0


@given(st.integers(0, 2**32), st.integers(1, 12), st.floats(0.05, 0.95), st.booleans())
@SEARCH
def test_the_tail_is_what_sorting_by_hand_takes(
    seed: int, samples: int, level: float, equal: bool
) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.integers(0, 4, (samples, 2, 3)).astype(np.float32)  # many ties
    fits = rng.random(losses.shape) < 0.8
    weights = np.ones(samples) if equal else rng.integers(0, 4, samples) / 3
    mean, edge = Ranked(losses, fits).tail(weights, level)
    for place in np.ndindex(2, 3):
        values, own = losses[(slice(None), *place)], weights * fits[(slice(None), *place)]
        assert mean[place] == pytest.approx(worst(values, own, level), rel=1e-9, abs=1e-12)
        if own.sum() > 0:
            # Rockafellar and Uryasev: the least over t of t + mean of what exceeds t / (1 - level)
            excess = np.maximum(values - edge[place], 0) @ own / own.sum()
            assert mean[place] == pytest.approx(edge[place] + excess / (1 - level), rel=1e-9)


@given(st.integers(0, 2**32))
@SEARCH
def test_the_order_of_samples_does_not_matter_to_the_tail(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses, weights = rng.gamma(0.5, size=(9, 4)).astype(np.float32), rng.random(9)
    fits = np.ones(losses.shape, dtype=bool)
    order = rng.permutation(9)
    first, second = (
        Ranked(losses[o], fits).tail(weights[o], 0.7)[0] for o in (np.arange(9), order)
    )
    np.testing.assert_allclose(first, second, rtol=1e-12)


def test_curves_are_means_of_the_worst_samples() -> None:
    """Ten samples: the worst two. The output error stays a mean of all."""
    rows = make_rows({"a": 5, "b": 5}, noise=1.0)
    rows[3].losses[:, 1, 0, 0, 2] = INFEASIBLE
    counts = np.ones(10, dtype=int)
    mean, tail = (Evidence.of(CONDITIONS, rows, d).pooled(counts) for d in (DECISION, CVAR))
    stack = np.stack([row.losses for row in rows]).astype(np.float64)
    for term, curve in ((1, tail.square), (2, tail.reply)):
        expected = np.sort(stack[:, term], axis=0)[-2:].mean(axis=0)
        expected[1, 0, 0, 2] = worst(np.delete(stack[:, term, 1, 0, 0, 2], 3), np.ones(9), 0.8)
        np.testing.assert_allclose(curve, expected, rtol=1e-9)
    np.testing.assert_array_equal(tail.output, mean.output)
    assert (tail.reply >= mean.reply).all()


def test_the_risk_is_recorded_and_plans_for_the_worst() -> None:
    """Every third sample loses ten times as much statically: their mean says dynamic."""
    rows = make_rows({"a": 12})
    for row in rows[::3]:
        row.losses[1:, 0] *= 25  # squares
    mean, tail = (
        build_profile(CONDITIONS, rows, None, replace(d, conservative=False))
        for d in (DECISION, CVAR)
    )
    assert mean.provenance["risk"] == "mean"
    assert tail.provenance["risk"] == "cvar 0.8"
    assert tail.head_types.sum() > mean.head_types.sum()


@pytest.mark.parametrize("wrong", [{"kind": "worst"}, {"level": 0.0}, {"level": 1.0}])
def test_risks_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="risk"):
        Risk(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "decided", [{"risk": Risk("cvar")}, {"conservative": False}], ids=["risk", "conservative"]
)
def test_what_paper_does_not_ask_is_refused_by_name(decided: dict[str, object]) -> None:
    conditions = replace(CONDITIONS, recipe="paper")
    with pytest.raises(UsageError, match="belong to the recipe 'measured'"):
        build_profile(conditions, make_rows({"a": 4}), None, Decision(**decided))  # type: ignore
