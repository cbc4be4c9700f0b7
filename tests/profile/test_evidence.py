"""What weighted parts of the rows decide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hkvprof.policy.budget import INFEASIBLE
from hkvprof.profile.merge import build_profile
from hkvprof.profile.probe import RATIOS
from hkvprof.profile.rows import SampleRow
from tests.profile.made_rows import (
    CONDITIONS,
    DECISION,
    SHAPE,
    assess,
    evidence_of,
    make_rows,
)


def some_fit_not(seed: int) -> list[SampleRow]:
    random = np.random.RandomState(seed)
    rows = make_rows({"a": 3, "b": 4}, noise=0.5)
    for row in rows:
        row.losses[:, 1][:, random.rand(*SHAPE, len(RATIOS)) < 0.4] = INFEASIBLE
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_counts_weigh_as_repeated_rows_do(seed: int) -> None:
    """Against means written down plainly; of everything, to the bit."""
    rows = some_fit_not(seed)
    evidence = evidence_of(rows, "paper")
    for counts in (evidence.everything, np.array([2, 0, 1, 3, 0, 0, 1])):
        repeated = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        losses = np.stack([row.losses for row in repeated]).astype(np.float64)
        fits = losses[:, :1] < INFEASIBLE
        number = fits.sum(axis=0)
        mean = np.where(fits, losses, 0).sum(axis=0) / np.maximum(number, 1)
        mean = np.where(number * 2 > len(repeated), mean, float(INFEASIBLE))
        curves = evidence.curves(counts)
        found = np.array([curves.output, curves.square, curves.reply])
        assert (found >= INFEASIBLE).any()
        np.testing.assert_allclose(found, mean, rtol=1e-12)
        assert np.array_equal(found, mean) or counts.max() > 1
        sparsity = np.stack([row.sparsity[2] for row in repeated]).astype(np.float64)
        expected = [sparsity.mean(axis=0), sparsity.std(axis=0)]
        np.testing.assert_allclose(evidence.moments(counts), expected, rtol=1e-5)


def test_the_whole_is_the_profile() -> None:
    rows = make_rows({"a": 4, "b": 4}, noise=0.7)
    for recipe in ("measured", "paper"):
        conditions = replace(CONDITIONS, recipe=recipe)
        profile = build_profile(conditions, rows, None, DECISION)
        evidence = evidence_of(rows, recipe)
        plan = evidence.plan(evidence.everything)
        assert np.array_equal(plan.types, profile.head_types)
        assert np.array_equal(plan.chosen.ratio, profile.budget)
        mean, std = evidence.moments(evidence.everything)
        assert np.array_equal(mean, profile.sparsity_mean[2])
        assert np.array_equal(std, profile.sparsity_std[2])
        recorded = profile.provenance["confidence"]
        assert recorded == assess(rows, recipe).to_json()
