"""What weighted parts of the rows decide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hkvprof.calibration import decide as classify
from hkvprof.calibration.merge import build_profile
from hkvprof.calibration.recipe import RATIOS, RecipeName
from hkvprof.calibration.rows import SampleRow
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.planning import plan_anew
from tests.calibration.made_rows import CONDITIONS, RECIPE, SHAPE, assess, evidence_of, make_rows


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
        curves = evidence.curves(counts)  # prompts of nearly one length: one anchor
        (found,) = np.stack([curves.output, curves.square, curves.reply], axis=1)
        assert (found >= INFEASIBLE).any()
        np.testing.assert_allclose(found, mean, rtol=1e-12)
        assert np.array_equal(found, mean) or counts.max() > 1
        sparsity = np.stack([row.sparsity[2] for row in repeated]).astype(np.float64)
        expected = [sparsity.mean(axis=0), sparsity.std(axis=0)]
        np.testing.assert_allclose(evidence.moments(counts), expected, rtol=1e-5)


def test_the_whole_is_the_profile() -> None:
    rows = make_rows({"a": 4, "b": 4}, noise=0.7)
    recipes: tuple[RecipeName, ...] = ("measured", "paper")
    for recipe in recipes:
        conditions = replace(CONDITIONS, recipe=recipe)
        profile = build_profile(conditions, rows, None, replace(RECIPE, name=recipe))
        evidence = evidence_of(rows, recipe)
        plan = evidence.judge(evidence.everything)
        assert np.array_equal(plan.types, profile.head_types)
        assert np.array_equal(plan.chosen.ratio, profile.budget)
        mean, std = evidence.moments(evidence.everything)
        assert np.array_equal(mean, profile.sparsity_mean[2])
        assert np.array_equal(std, profile.sparsity_std[2])
        recorded = profile.provenance["confidence"]
        assert recorded == assess(rows, recipe).to_json()


def of_lengths(lengths: list[int], noise: float = 0.5) -> list[SampleRow]:
    """Samples that lose the more the longer they are."""
    rows = make_rows({"a": len(lengths)}, noise=noise)
    return [
        replace(row, tokens=n, losses=row.losses * np.float32(n / 1000))
        for row, n in zip(rows, lengths, strict=True)
    ]


LENGTHS = [1000] * 6 + [1500] * 5 + [2000] * 6 + [4000] * 6


@pytest.mark.parametrize("counted", ["all", "some"])
def test_curves_of_every_length_are_weighted_means(counted: str) -> None:
    """Against the definition: weights linear in log length, each anchor's mean of its own."""
    evidence = evidence_of(of_lengths(LENGTHS))
    anchors = evidence.anchors
    assert len(anchors.lengths) == 3
    counts = evidence.everything
    if counted == "some":
        counts = np.random.RandomState(0).randint(0, 3, len(LENGTHS))
    weights = anchors.weights * counts
    curves = evidence.curves(counts)
    found = np.stack([curves.output, curves.square, curves.reply], axis=1)
    for at, weight in enumerate(weights):
        expected = np.average(evidence.losses.astype(np.float64), axis=0, weights=weight)
        np.testing.assert_allclose(found[at], expected, rtol=1e-12)
    assert (np.diff(curves.output[:, 0, ..., 0].mean(axis=(1, 2))) > 0).all()


def test_the_profile_keeps_a_grid_of_lengths_on_one_scale() -> None:
    rows = of_lengths(LENGTHS)
    conditions = replace(CONDITIONS, recipe="measured")
    profile = build_profile(conditions, rows, None, RECIPE)
    evidence = evidence_of(rows)
    np.testing.assert_array_equal(profile.lengths, evidence.anchors.lengths)
    scales = classify.loss_scales(evidence.pooled(evidence.everything), evidence.ratios)
    curves = evidence.curves(evidence.everything)
    for at in range(3):
        alone = classify.Curves(curves.output[at], curves.square[at], curves.reply[at])
        expected = classify.planning_loss(alone, evidence.ratios, scales)
        np.testing.assert_array_equal(profile.loss[at], expected)
    plan = evidence.judge(evidence.everything)
    again = profile.allocation(RECIPE.budget, evidence.menu.tokens)
    np.testing.assert_array_equal(again.ratio, plan.chosen.ratio)
    np.testing.assert_array_equal(again.ratio, profile.budget)
    np.testing.assert_array_equal(again.strategy, profile.strategy)
    losses = [float(profile.loss_at(n)[..., 0].sum()) for n in (500, 1000, 2000, 4000, 9000)]
    assert losses[0] == losses[1] < losses[2] < losses[3] == losses[4]


def test_the_order_of_samples_does_not_matter() -> None:
    rows = of_lengths(LENGTHS)
    mixed = [rows[i] for i in np.random.RandomState(1).permutation(len(rows))]
    first, second = (build_profile(CONDITIONS, part, None, RECIPE) for part in (rows, mixed))
    assert first.to_bytes() == second.to_bytes()


def test_single_samples_are_judged_by_their_own_curves_at_any_length() -> None:
    """A sample alone says the same whatever anchors the others have."""
    rows = of_lengths(LENGTHS, noise=1.0)
    evidence = evidence_of(rows)
    scales = evidence.judge(evidence.everything).scales
    for sample in (0, 8, len(rows) - 1):
        alone = classify.Curves(*evidence.losses[sample].astype(np.float64))
        loss = classify.planning_loss(alone, evidence.ratios, scales)
        chosen = plan_anew(evidence.menu, loss, evidence.ratios, RECIPE.budget)
        kinds = np.array([s.head_type for s in CONDITIONS.strategies])
        found = evidence.types_of_sample(sample, scales)
        np.testing.assert_array_equal(found, kinds[chosen.strategy])


def test_a_loss_of_four_times_the_squares_counts_twice() -> None:
    ratios = np.array([0.05, 1.0], dtype=np.float32)
    square = np.array([1.0, 4.0]).reshape(1, 1, 2, 1) * np.ones((1, 1, 2, 2))
    found = classify.planning_loss(classify.Curves(square, square, square), ratios, (1.0, 1.0))
    np.testing.assert_allclose(found[0, 0, 1], 2 * found[0, 0, 0])
