"""Types in doubt become dynamic, at every budget."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.calibration import decide as classify
from hkvprof.calibration.decide import NO_PROOF, static_margin
from hkvprof.calibration.evidence import Evidence
from hkvprof.calibration.merge import build_profile
from hkvprof.calibration.rows import SampleRow
from hkvprof.profile.budgets import NEAR, Allocation
from hkvprof.profile.dealing import losses_of
from hkvprof.profile.planning import Rules, plan_anew
from hkvprof.profile.record import Profile
from tests.calibration.made_rows import CONDITIONS, RECIPE, SHAPE, D, S, make_rows

STATIC = np.array([True, False])


def noisy_rows(samples: int, noise: float, gap: float, seed: int = 0) -> list[SampleRow]:
    """Static loses `gap` times what dynamic does, times noise of each sample and strategy."""
    rows = make_rows({"a": samples}, seed=seed)
    random = np.random.RandomState(seed)
    for row in rows:
        plain = row.losses.min(axis=1, keepdims=True)
        spread = np.exp(noise * random.randn(3, 2, *SHAPE, 1))
        row.losses[:] = plain * spread * np.array([gap, 1]).reshape(2, 1, 1, 1)
    return rows


def best_gap(evidence: Evidence, counts: np.ndarray, scales: tuple[float, float]) -> np.ndarray:
    """Static minus dynamic planning loss of a part of the samples."""
    loss = classify.planning_loss(evidence.pooled(counts), evidence.ratios, scales)
    return loss[0].astype(np.float64) - loss[1]


def decided_freely(evidence: Evidence) -> Allocation:
    """Without the margin: strategy 0 is static, 1 dynamic, as are the types."""
    return evidence.chosen(evidence.judge(evidence.everything).loss_here, None)


def test_the_margin_is_a_jackknife_interval() -> None:
    """Leave out one sample at a time; the delta method agrees with that to second order."""
    samples = 60
    rows = noisy_rows(samples, noise=0.4, gap=1.0)
    evidence = Evidence.of(CONDITIONS, rows, RECIPE)
    whole = evidence.judge(evidence.everything)
    assert whole.margin is not None
    left = np.stack([
        best_gap(evidence, evidence.everything - np.eye(samples, dtype=int)[i], whole.scales)
        for i in range(samples)
    ])  # fmt: skip
    spread = np.sqrt((samples - 1) * left.var(axis=0))
    found, expected = whole.margin[0][..., :8], 1.96 * spread[..., :8]
    np.testing.assert_allclose(found, expected, rtol=0.25)
    assert np.median(found / expected) == pytest.approx(1, abs=0.05)


def test_what_is_clear_stays_and_what_is_not_becomes_dynamic() -> None:
    clear = build_profile(CONDITIONS, noisy_rows(20, 0.1, 0.5), None, RECIPE)
    assert (clear.head_types == S).all()
    assert clear.provenance["conservative"] == 0
    close = noisy_rows(20, 0.5, 0.9)
    careful = build_profile(CONDITIONS, close, None, RECIPE)
    free = decided_freely(Evidence.of(CONDITIONS, close, RECIPE))
    doubted = (free.strategy == S) & (careful.head_types == D)
    assert doubted.sum() == careful.provenance["conservative"] >= 2
    assert (careful.head_types == D).sum() - (free.strategy == D).sum() == doubted.sum()
    np.testing.assert_array_equal(free.ratio, careful.budget)


def test_types_by_sparsity_have_no_margin() -> None:
    conditions = replace(CONDITIONS, recipe="paper")
    profile = build_profile(conditions, make_rows({"a": 4}), None, replace(RECIPE, name="paper"))
    assert profile.static_margin is None
    assert "conservative" not in profile.provenance


@lru_cache
def of_two_lengths(seed: int) -> Profile:
    rows = noisy_rows(8, 0.5, 0.8, seed)
    for row in rows[:4]:
        row.losses[:] *= 2
    rows = [replace(row, tokens=1000 if i < 4 else 3000) for i, row in enumerate(rows)]
    return build_profile(CONDITIONS, rows, None, RECIPE)


@given(st.integers(0, 3), st.floats(0.05, 1), st.integers(500, 20_000))
@settings(max_examples=100, deadline=None)
def test_every_later_plan_keeps_static_heads_that_are_proven(
    seed: int, share: float, tokens: int
) -> None:
    """By definition: static where it loses less by more than the margin, or nothing else fits.

    A budget of reads may force others, whose margins then count as loss (test_fetch).
    """
    profile = of_two_lengths(seed)
    plan, freely = (
        one.allocation(share, tokens, fetch="unlimited")
        for one in (profile, replace(profile, static_margin=None))
    )
    np.testing.assert_array_equal(plan.ratio, freely.ratio)
    assert plan.ratio.astype(np.float64).mean() <= share + 1e-12
    assert len(profile.lengths) == 2
    assert profile.static_margin is not None
    at = (np.log(tokens) - np.log(profile.lengths[0])) / np.diff(np.log(profile.lengths))[0]
    at = np.clip(at, 0, 1)
    margin = (1 - at) * profile.static_margin[0] + at * profile.static_margin[1]
    loss, menu = profile.loss_at(tokens), profile._question(share, tokens, 2, 1)[0]
    kind = np.zeros(SHAPE, dtype=np.uint8)
    ours, theirs = (losses_of(loss, profile.ratios, kind + i, plan.ratio) for i in (0, 1))
    for place in np.ndindex(*SHAPE):
        ratio = float(plan.ratio[place])
        known = np.log(profile.ratios.astype(float))
        own = np.interp(np.log(ratio), known, margin[place])
        below = int(np.searchsorted(profile.ratios, ratio * (1 + 1e-6), "right")) - 1
        least = float(profile.ratios[below]) * (1 - NEAR)
        fits = below >= 0 and menu.fits(profile.strategies[1], least)
        gap = theirs[place] - ours[place]
        if ratio < 1 and fits and abs(gap - own) > 1e-4:
            assert plan.strategy[place] == int(gap < own)


def test_one_sample_proves_nothing() -> None:
    rows = make_rows({"a": 1})
    evidence = Evidence.of(CONDITIONS, rows, RECIPE)
    (part,) = (evidence._sampled(weights) for weights in evidence.anchors.weights)
    scales = classify.loss_scales(part.curves, evidence.ratios)
    margin = static_margin(part, evidence.ratios, scales, STATIC)
    np.testing.assert_array_equal(margin, np.float32(NO_PROOF))
    assert (build_profile(CONDITIONS, rows, None, RECIPE).head_types == D).all()
    assert (decided_freely(evidence).strategy == S).any()


def test_the_order_of_heads_and_samples_does_not_matter() -> None:
    rows = noisy_rows(12, 0.5, 0.9)
    evidence = Evidence.of(CONDITIONS, rows, RECIPE)
    whole = evidence.judge(evidence.everything)
    mixed = [replace(row, id=f"x{len(rows) - i:03}") for i, row in enumerate(rows)]
    again = Evidence.of(CONDITIONS, mixed, RECIPE).judge(evidence.everything)
    np.testing.assert_allclose(again.margin, whole.margin, rtol=1e-6)
    turned = [replace(row, losses=row.losses[..., ::-1, :].copy()) for row in rows]
    other = Evidence.of(CONDITIONS, turned, RECIPE).judge(evidence.everything)
    np.testing.assert_allclose(other.margin, whole.margin[..., ::-1, :], rtol=1e-6)
    np.testing.assert_array_equal(other.types, whole.types[:, ::-1])


def test_a_margin_without_doubt_changes_nothing() -> None:
    rows = noisy_rows(6, 0.5, 0.9)
    evidence = Evidence.of(CONDITIONS, rows, RECIPE)
    judgement, free = evidence.judge(evidence.everything), decided_freely(evidence)
    none = np.zeros((*SHAPE, len(evidence.ratios)), dtype=np.float32)
    again = plan_anew(evidence.menu, judgement.loss_here, evidence.ratios, 0.3, Rules(), none)
    np.testing.assert_array_equal(again.strategy, free.strategy)
