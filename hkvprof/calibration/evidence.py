"""The rows of all samples as one body, and what any weighted part of it decides.

A profile is the decision of all samples, each counted once (`merge`). How sure it is shows in what
single samples, halves, tasks and resamples decide (`confidence`): the same functions, with other
counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hkvprof.calibration import decide as classify
from hkvprof.calibration.decide import NO_PROOF, Sampled, static_margin
from hkvprof.calibration.recipe import Recipe
from hkvprof.errors import UsageError
from hkvprof.heads import HeadType
from hkvprof.profile.budgets import INFEASIBLE, Allocation
from hkvprof.profile.planning import Menu, loss_between, plan_anew

if TYPE_CHECKING:
    from hkvprof.calibration.rows import Conditions, SampleRow

Counts = NDArray[np.int64]
"""[samples]: how often each sample counts."""


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a part of the samples decides.

    Mean curves and what planning minimises, both [anchors, strategies, layers, kv_heads, ratios];
    the `scales` of the latter; `loss_here`, at the menu's prompt length; `margin`
    [anchors, layers, kv_heads, ratios] of static strategies (planning.plan_anew), if there is one;
    strategy and ratio per head, and types [layers, kv_heads].
    """

    curves: classify.Curves
    loss: NDArray[np.float32]
    scales: tuple[float, float]
    loss_here: NDArray[np.float32]
    margin: NDArray[np.float32] | None
    chosen: Allocation
    types: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Evidence:
    """All rows, sorted by sample id.

    `losses` [samples, 3 terms, strategies, layers, kv_heads, ratios] holds 0 where a point does not
    fit a sample, `fits` (1 term) tells where; `sparsity` is [samples, kappas, layers, query_heads].
    """

    conditions: Conditions
    recipe: Recipe
    tasks: tuple[str, ...]
    tokens: NDArray[np.int64]
    vision_tokens: NDArray[np.int64]
    sparsity: NDArray[np.float32]
    losses: NDArray[np.float32]
    fits: NDArray[np.bool_]

    @classmethod
    def of(cls, conditions: Conditions, rows: Sequence[SampleRow], recipe: Recipe) -> Evidence:
        """The evidence of one or more rows, in any order."""
        rows = sorted(rows, key=lambda row: row.id)
        losses = np.stack([row.losses for row in rows])
        fits = losses[:, :1] < INFEASIBLE
        return cls(
            conditions=conditions,
            recipe=recipe,
            tasks=tuple(row.task for row in rows),
            tokens=np.array([row.tokens for row in rows], dtype=np.int64),
            vision_tokens=np.array([row.vision_tokens for row in rows], dtype=np.int64),
            sparsity=np.stack([row.sparsity for row in rows]),
            losses=np.where(fits, losses, np.float32(0)),
            fits=fits,
        )

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.tasks)

    @property
    def everything(self) -> Counts:
        """Counts in which every sample occurs once."""
        return np.ones(self.samples, dtype=np.int64)

    @cached_property
    def ratios(self) -> NDArray[np.float32]:
        """Abscissae of the curves."""
        return np.array(self.conditions.ratios, dtype=np.float32)

    @cached_property
    def anchors(self) -> Anchors:
        """Prompt lengths of the curves: of all samples, whatever part of them is looked at."""
        return choose_anchors(self.tokens)

    @cached_property
    def menu(self) -> Menu:
        """For the mean prompt length, or the shortest at which the default share holds sinks and
        recent tokens."""
        conditions, budget = self.conditions, self.recipe.budget
        tokens = max(
            math.ceil(float(self.tokens.mean())),
            math.ceil(conditions.keep.floor_tokens / budget) + 1,
        )
        return Menu(
            conditions.strategies, conditions.keep, conditions.grid.head_dim, tokens,
            conditions.itemsize,
        )  # fmt: skip

    @cached_property
    def _kappa(self) -> int:
        known = self.conditions.kappas
        if self.recipe.kappa not in known:
            raise UsageError(
                f"sparsity was not measured at kappa {self.recipe.kappa:g}: expected one of "
                f"{', '.join(f'{kappa:g}' for kappa in known)}, or measure again with that kappa"
            )
        return known.index(self.recipe.kappa)

    def judge(
        self, counts: Counts, scales: tuple[float, float] | None = None, whole: bool = True
    ) -> Judgement:
        """Types and budgets at the default share, for the menu's prompt length whatever the counts.

        `scales` of the planning loss: those of these very samples unless given. A part
        of the samples (not `whole`) doubts no type where it has but one of them.
        """
        recipe, grid = self.recipe, self.conditions.grid
        scales = scales or classify.loss_scales(self.pooled(counts), self.ratios)
        parts = [self._sampled(weights) for weights in self.anchors.of(counts)]
        curves = _stacked(parts)
        margin = None
        if self._doubts:
            margins = [static_margin(part, self.ratios, scales, self._static) for part in parts]
            margin = np.stack(margins)
            margin = margin if whole else np.where(margin < NO_PROOF, margin, np.float32(0))
        loss = classify.planning_loss(curves, self.ratios, scales)
        here = loss_between(loss, self.anchors.lengths, self.menu.tokens)
        if self.conditions.recipe == "paper":
            mean, std = self.moments(counts)
            types = classify.classify_by_sparsity(mean, std, int(counts.sum()), recipe.theta, grid)
            chosen = classify.allocate_by_sparsity(
                types, mean, recipe.budget, self.menu.floor, grid, recipe.coefficient
            )
        else:
            chosen = self.chosen(here, margin)
        types = np.where(self._static, HeadType.STATIC, HeadType.DYNAMIC)[chosen.strategy]
        return Judgement(curves, loss, scales, here, margin, chosen, types.astype(np.uint8))

    def chosen(self, loss: NDArray[np.float32], margin: NDArray[np.float32] | None) -> Allocation:
        """Curves at the menu's prompt length, planned; `margin` is one of every anchor."""
        here = None
        if margin is not None:
            here = loss_between(margin, self.anchors.lengths, self.menu.tokens)
        return plan_anew(self.menu, loss, self.ratios, self.recipe.budget, margin=here)

    @cached_property
    def _static(self) -> NDArray[np.bool_]:
        return np.array([s.head_type is HeadType.STATIC for s in self.conditions.strategies])

    @property
    def _doubts(self) -> bool:
        """Whether types may be in doubt: measured ones of a menu with both."""
        both = bool(self._static.any()) and not bool(self._static.all())
        return self.conditions.recipe == "measured" and both

    def types_of_sample(self, sample: int, scales: tuple[float, float]) -> NDArray[np.uint8]:
        """[layers, kv_heads]: what this sample alone would say.

        By its own sparsity (`paper`), or planned on its own curves with the `scales` of all samples
        (`measured`); without an interval, there is but one.
        """
        if self.conditions.recipe == "paper":
            sparsity = self.sparsity[sample, self._kappa]
            return classify.types_by_sparsity(sparsity, self.recipe.theta, self.conditions.grid)
        alone = np.zeros(self.samples, dtype=np.int64)
        alone[sample] = 1
        return self.judge(alone, scales, whole=False).types

    def curves(self, counts: Counts) -> classify.Curves:
        """Means at every anchor, [anchors, strategies, layers, kv_heads, ratios]."""
        return _stacked([self._sampled(weights) for weights in self.anchors.of(counts)])

    def pooled(self, counts: Counts) -> classify.Curves:
        """Means over samples of all lengths, [strategies, layers, kv_heads, ratios]."""
        return self._sampled(counts.astype(np.float64)).curves

    def _sampled(self, weights: NDArray[np.float64]) -> Sampled:
        """Curves of samples of these weights, and what they rest on."""
        curves = classify.Curves(*self._mean(weights))
        return Sampled(self.losses, self.fits, weights, curves)

    def _mean(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """[3 terms, strategies, ...]: over the samples where a point fits, in float64.

        A point that does not fit most samples is INFEASIBLE.
        """
        weight = _weighted_sum(self.fits, weights)
        mean = _weighted_sum(self.losses, weights) / np.where(weight > 0, weight, 1)
        most = weight * 2 > _weighted_sum(np.ones(self.samples), weights)
        return np.where(most, mean, float(INFEASIBLE))

    def moments(self, counts: Counts) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation [layers, query_heads] of the sparsity at the kappa chosen."""
        sparsity = self.sparsity[:, self._kappa].astype(np.float64)
        total = int(counts.sum())
        mean = _weighted_sum(sparsity, counts) / total
        std = np.sqrt(_weighted_sum((sparsity - mean) ** 2, counts) / total)
        return mean.astype(np.float32), std.astype(np.float32)


def _stacked(parts: Sequence[Sampled]) -> classify.Curves:
    """The curves of every anchor."""
    names = ("output", "square", "reply")
    return classify.Curves(*(np.stack([getattr(p.curves, n) for p in parts]) for n in names))


def _weighted_sum(
    values: NDArray[np.generic], weights: NDArray[np.int64] | NDArray[np.float64]
) -> NDArray[np.float64]:
    """Sum over the first axis, sample by sample: a matrix product would depend on the BLAS."""
    total = np.zeros(values.shape[1:])
    for sample in weights.nonzero()[0]:
        row = values[sample].astype(np.float64)
        total += row if weights[sample] == 1 else row * weights[sample]
    return total


# -- prompt lengths that curves are kept at -------------------------------------------------------

MOST = 4
"""Anchors of a profile."""
STEP = 2.0
"""About the factor between two of them."""
SPREAD = 1.5
"""Longest over shortest prompt below which one anchor is enough."""
LEAST_WEIGHT = 4.0
"""Samples that an anchor rests on at least, each counted by its weight."""
NEAREST = 1.2
"""Least factor between two anchors; what is nearer says the same twice."""

Weights = NDArray[np.float64]
"""[anchors, samples]: how much each sample counts at each anchor."""


@dataclass(frozen=True, eq=False)
class Anchors:
    """`lengths` int64 [anchors], rising, and `weights`, which sum to 1 for every sample."""

    lengths: NDArray[np.int64]
    weights: Weights

    def of(self, counts: NDArray[np.int64]) -> Weights:
        """Weights where sample i counts `counts[i]` times, at least one more than 0 times.

        An anchor that none of them reaches takes those of the nearest one that is reached.
        """
        weights = self.weights * counts
        (reached,) = np.nonzero(weights.sum(axis=1))
        nearest = [reached[np.abs(reached - a).argmin()] for a in range(len(weights))]
        return weights[nearest]


def choose_anchors(tokens: NDArray[np.int64]) -> Anchors:
    """Anchors for samples of these lengths [samples], in any order.

    Evenly spaced in log length from the shortest to the longest; one that has too little weight, or
    lies too near to another, gives its samples to its neighbours. Each anchor stands at the
    weighted (geometric) mean length of its samples, so that what grows with log length is read
    without bias.
    """
    logs = np.array([math.log(max(1, n)) for n in tokens.tolist()])
    spread = float(logs.max() - logs.min())
    count = min(MOST, 1 + round(spread / math.log(STEP))) if spread >= math.log(SPREAD) else 1
    places = np.linspace(logs.min(), logs.max(), count)
    while True:
        weights = _hats(logs, places)
        # fsum, so that sums do not depend on the order of samples
        total = np.array([math.fsum(row) for row in weights])
        means = np.array([math.fsum(row * logs) for row in weights]) / total.clip(min=1e-9)
        drop = _dispensable(total, means)
        if drop is None:
            return Anchors(np.exp(means).round().astype(np.int64), weights)
        places = np.delete(places, drop)


def _hats(logs: NDArray[np.float64], places: NDArray[np.float64]) -> Weights:
    """Linear weights of each sample at the two places around it; all at the end beyond the ends."""
    unit = np.eye(len(places))
    return np.stack([np.interp(logs, places, row) for row in unit])


def _dispensable(total: NDArray[np.float64], means: NDArray[np.float64]) -> int | None:
    """The anchor to drop: the lightest below LEAST_WEIGHT, else the lighter of the nearest pair."""
    if len(total) == 1:
        return None
    if total.min() < LEAST_WEIGHT - 1e-6:  # weights of whole samples are not quite whole
        return int(total.argmin())
    gaps = np.diff(means)
    left = int(gaps.argmin())
    if gaps[left] >= math.log(NEAREST):
        return None
    return left + int(total[left + 1] < total[left])
