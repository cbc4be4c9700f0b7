"""Is a plan of few samples wrong because they are few? Planned on a part, judged on the rest.

    python -m tools.studies.study_halves ROWS [--repeats 4] [--samples 4,8,13] [--seed 0]

ROWS is a folder of `hkvprof calibrate --rows`. Random parts of its samples are planned with, by
bytes alone; what the other samples lose under a plan is the sum over heads of root mean squares, as
they were measured, over that of the plan which is made with those samples themselves. Variants: the
curves as they are, some of a budget dealt evenly, losses shrunk to means in logarithms or by one
pseudo-sample of the layer's mean, and roots of the losses. docs/experiments.md quotes the table.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from hkvprof.calibration import decide
from hkvprof.calibration.decide import Curves
from hkvprof.calibration.evidence import Evidence, choose_anchors
from hkvprof.calibration.merge import gather
from hkvprof.errors import BudgetError
from hkvprof.heads import Rules
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.dealing import losses_of
from hkvprof.profile.planning import loss_between, plan_anew

Array = NDArray[np.float64]
BUDGETS = (0.2, 0.1, 0.05, 0.03, 0.02)
SIZES = 0.5
"""The power that makes sizes of mean squares."""


def raw(evidence: Evidence, weights: Array) -> Curves:
    """Means over samples."""
    return Curves(*evidence._mean(weights))


def pseudo(evidence: Evidence, weights: Array) -> Curves:
    """One more sample, in which all heads of a layer lose the layer's mean."""
    found, (count, _) = raw(evidence, weights), _counted(weights)
    terms = [_to_layer(term, 1 / (count + 1)) for term in (found.square, found.reply)]
    return Curves(found.output, *terms)


def _to_layer(mean: Array, part: float) -> Array:
    there = mean < INFEASIBLE
    known = np.where(there, mean, 0)
    return np.where(there, (1 - part) * known + part * known.mean(axis=2, keepdims=True), mean)


def logarithmic(evidence: Evidence, weights: Array) -> Curves:
    """Empirical Bayes of log losses, head to layer to all; the mean of a log-normal distribution.

    Variances over samples are pooled over heads, those between heads and layers by moments.
    """
    found, (count, _) = raw(evidence, weights), _counted(weights)
    fits = evidence.fits[:, 0]
    part = weights / weights.sum()
    terms = []
    for number, mean in ((1, found.square), (2, found.reply)):
        logs = np.where(fits, np.log(np.maximum(evidence.losses[:, number], 1e-14)), 0)
        share = np.maximum(np.tensordot(part, fits, 1), 1e-9)
        level = np.tensordot(part, logs, 1) / share
        spread = np.tensordot(part, np.where(fits, (logs - level) ** 2, 0), 1) / share
        spread = spread.mean(axis=(1, 2), keepdims=True) * count / max(count - 1, 1)
        shrunk = np.exp(_shrunk(level, spread / count) + spread / 2)
        terms.append(np.where(mean < INFEASIBLE, shrunk, mean))
    return Curves(found.output, *terms)


def _counted(weights: Array) -> tuple[float, float]:
    """How many equal samples these weights are worth, and their sum."""
    return float(weights.sum() ** 2 / (weights**2).sum()), float(weights.sum())


def _shrunk(level: Array, variance: Array) -> Array:
    """[strategies, layers, heads, ratios]: heads to their layer, layers to all."""
    layer = level.mean(axis=2, keepdims=True)
    within = level.var(axis=2, ddof=1).mean(axis=1)[:, None, None] - variance
    between = layer.var(axis=1, ddof=1, keepdims=True) - variance / level.shape[2]
    weight, outer = (
        x / (x + v)
        for x, v in (
            (np.maximum(within, 1e-9), variance),
            (np.maximum(between, 1e-9), variance / level.shape[2]),
        )
    )
    whole = layer.mean(axis=1, keepdims=True)
    return weight * level + (1 - weight) * (outer * layer + (1 - outer) * whole)


Estimate = Callable[[Evidence, Array], Curves]
VARIANTS: dict[str, tuple[Estimate, float, float]] = {
    "means": (raw, SIZES, 0.0),
    "three quarters evenly (as shipped)": (raw, SIZES, 0.75),
    "all evenly": (raw, SIZES, 1.0),
    "shrunk logarithms": (logarithmic, SIZES, 0.0),
    "a pseudo-sample of the layer": (pseudo, SIZES, 0.0),
    "fourth roots": (raw, SIZES / 2, 0.0),
}


def main() -> None:
    """Run the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--samples", default="4,8,13")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    conditions, rows, _ = gather([options.rows])
    evidence = Evidence.of(conditions, rows, conditions.measured_by)
    draw = np.random.default_rng(options.seed)
    sys.stdout.write("| samples | variant | " + " | ".join(f"{b:.0%}" for b in BUDGETS) + " |\n")
    sys.stdout.write("|---|---|" + "---|" * len(BUDGETS) + "\n")
    for count in map(int, options.samples.split(",")):
        parts = [draw.permutation(evidence.samples) for _ in range(options.repeats)]
        found = [_lost(evidence, np.sort(p[:count]), np.sort(p[count:])) for p in parts]
        for number, name in enumerate(VARIANTS):
            cells = " | ".join(f"{x:.3f}" for x in np.mean(found, axis=0)[number])
            sys.stdout.write(f"| {count} | {name} | {cells} |\n")
        sys.stdout.flush()


def _lost(evidence: Evidence, part: NDArray[np.intp], rest: NDArray[np.intp]) -> Array:
    """[variants, budgets]: what `rest` loses under plans of `part`, over its own plans' loss."""
    truth = _curves(evidence, rest, raw, SIZES)
    table = np.full((len(VARIANTS), len(BUDGETS)), np.nan)
    for row, (estimate, power, even) in enumerate(VARIANTS.values()):
        curves = _curves(evidence, part, estimate, power)
        for column, budget in enumerate(BUDGETS):
            table[row, column] = _under(evidence, truth, curves, budget, even)
    best = [_under(evidence, truth, truth, budget, 0.0) for budget in BUDGETS]
    return table / np.array(best)


def _under(
    evidence: Evidence,
    truth: NDArray[np.float32],
    curves: NDArray[np.float32],
    share: float,
    even: float,
) -> float:
    """Loss by `truth` of the plan that `curves` make; NaN where nothing fits."""
    try:
        plan = plan_anew(evidence.menu, curves, evidence.ratios, share, Rules(even), fetch=math.inf)
    except BudgetError:
        return float("nan")
    return float(np.nansum(losses_of(truth, evidence.ratios, plan.strategy, plan.ratio)))


def _curves(
    evidence: Evidence, samples: NDArray[np.intp], estimate: Estimate, power: float
) -> NDArray[np.float32]:
    """Planning curves of these samples at the menu's length, scaled alike for all parts."""
    anchors = choose_anchors(evidence.tokens[samples])
    scales = decide.loss_scales(evidence.pooled(evidence.everything), evidence.ratios)
    losses = []
    for own in anchors.weights:
        weights = np.zeros(evidence.samples)
        weights[samples] = own
        with mock.patch.object(decide, "POWER", power):
            curves = estimate(evidence, weights)
            losses.append(decide.planning_loss(curves, evidence.ratios, scales))
    return loss_between(np.stack(losses), anchors.lengths, evidence.menu.tokens)


if __name__ == "__main__":
    main()
