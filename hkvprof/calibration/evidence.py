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
from hkvprof.calibration.decide import NO_PROOF, Anchors, Sampled, choose_anchors, static_margin
from hkvprof.calibration.risk import Ranked, Risk
from hkvprof.errors import UsageError
from hkvprof.heads import HeadType
from hkvprof.profile.budgets import INFEASIBLE, Allocation
from hkvprof.profile.planning import DEFAULT, Menu, Rules, loss_between, plan_anew

if TYPE_CHECKING:
    from hkvprof.calibration.conditions import Conditions
    from hkvprof.calibration.rows import SampleRow

THETA_KAPPA = 0.10
"""The kappa whose sparsity HybridKV's rule looks at by default."""

CONSERVATIVE = True
"""Whether types in doubt become dynamic (docs/experiments.md, "Types in doubt")."""
MEAN = Risk()

Counts = NDArray[np.int64]
"""[samples]: how often each sample counts."""


@dataclass(frozen=True)
class Decision:
    """What is decided after measuring.

    The default budget. Of the recipe `paper`: `theta`, the `kappa` whose sparsity is held against
    it, and the `coefficient` r of allocate_by_sparsity. For `measured`: the `rules` of planning,
    the `risk` over samples, and whether a head whose type is in doubt becomes dynamic
    (`conservative`). `seed` and `skipped` samples are only recorded. Raises UsageError for numbers
    out of range.
    """

    theta: float = 0.9
    budget: float = 0.10
    kappa: float = THETA_KAPPA
    coefficient: float = 1.0
    seed: int = 0
    skipped: tuple[str, ...] = ()
    rules: Rules = DEFAULT
    risk: Risk = MEAN
    conservative: bool = CONSERVATIVE

    def __post_init__(self) -> None:
        if not 0 < self.theta <= 1:
            raise UsageError(f"theta must lie in (0, 1], found {self.theta}")
        if not 0 < self.budget <= 1:
            raise UsageError(f"the default budget must be a share in (0, 1], found {self.budget}")
        if not 0 < self.kappa <= 1:
            raise UsageError(f"kappa must be a share in (0, 1], found {self.kappa}")
        if not 0.01 <= self.coefficient <= 100:
            raise UsageError(f"coefficient must lie in [0.01, 100], found {self.coefficient}")

    def check(self, recipe: str) -> None:
        """Raise UsageError where something is decided that the recipe does not ask about."""
        asked = {
            "rules of planning": self.rules != DEFAULT,
            "a risk other than the mean": not self.risk.is_mean,
            "conservative types": self.conservative != CONSERVATIVE,
        }
        given = [name for name, differs in asked.items() if differs]
        if recipe != "measured" and given:
            raise UsageError(
                f"{', '.join(given)} belong to the recipe 'measured', and these samples were "
                f"measured for {recipe!r}: leave them out, or calibrate with --recipe measured"
            )


@dataclass(frozen=True, eq=False)
class Plan:
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
    decision: Decision
    tasks: tuple[str, ...]
    tokens: NDArray[np.int64]
    vision_tokens: NDArray[np.int64]
    sparsity: NDArray[np.float32]
    losses: NDArray[np.float32]
    fits: NDArray[np.bool_]

    @classmethod
    def of(cls, conditions: Conditions, rows: Sequence[SampleRow], decision: Decision) -> Evidence:
        """The evidence of one or more rows, in any order."""
        rows = sorted(rows, key=lambda row: row.id)
        losses = np.stack([row.losses for row in rows])
        fits = losses[:, :1] < INFEASIBLE
        return cls(
            conditions=conditions,
            decision=decision,
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
        """Every sample once."""
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
        conditions, budget = self.conditions, self.decision.budget
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
        if self.decision.kappa not in known:
            raise UsageError(
                f"sparsity was not measured at kappa {self.decision.kappa:g}: expected one of "
                f"{', '.join(f'{kappa:g}' for kappa in known)}, or measure again with that kappa"
            )
        return known.index(self.decision.kappa)

    def plan(
        self, counts: Counts, scales: tuple[float, float] | None = None, whole: bool = True
    ) -> Plan:
        """Types and budgets at the default share, for the menu's prompt length whatever the counts.

        `scales` of the planning loss: those of these very samples unless given. A part
        of the samples (not `whole`) doubts no type where it has but one of them.
        """
        decision, grid = self.decision, self.conditions.grid
        scales = scales or classify.loss_scales(self.pooled(counts), self.ratios)
        parts = [self._sampled(weights) for weights in self.anchors.of(counts)]
        curves = _stacked(parts)
        margin = None
        if self._doubts:
            found = [static_margin(part, self.ratios, scales, self._static) for part in parts]
            margin = np.stack(found)
            margin = margin if whole else np.where(margin < NO_PROOF, margin, np.float32(0))
        loss = classify.planning_loss(curves, self.ratios, scales)
        here = loss_between(loss, self.anchors.lengths, self.menu.tokens)
        if self.conditions.recipe == "paper":
            mean, std = self.moments(counts)
            types = classify.classify_by_sparsity(
                mean, std, int(counts.sum()), decision.theta, grid
            )
            chosen = classify.allocate_by_sparsity(
                types, mean, decision.budget, self.menu.floor, grid, decision.coefficient
            )
        else:
            chosen = self.chosen(here, margin)
        types = np.where(self._static, HeadType.STATIC, HeadType.DYNAMIC)[chosen.strategy]
        return Plan(curves, loss, scales, here, margin, chosen, types.astype(np.uint8))

    def chosen(self, loss: NDArray[np.float32], margin: NDArray[np.float32] | None) -> Allocation:
        """Curves at the menu's prompt length, planned; `margin` is one of every anchor."""
        here = None
        if margin is not None:
            here = loss_between(margin, self.anchors.lengths, self.menu.tokens)
        decision = self.decision
        return plan_anew(self.menu, loss, self.ratios, decision.budget, decision.rules, here)

    @cached_property
    def _static(self) -> NDArray[np.bool_]:
        return np.array([s.head_type is HeadType.STATIC for s in self.conditions.strategies])

    @property
    def _doubts(self) -> bool:
        """Whether types may be in doubt: measured ones of a menu with both."""
        both = bool(self._static.any()) and not bool(self._static.all())
        return self.decision.conservative and self.conditions.recipe == "measured" and both

    def types_of_sample(self, sample: int, scales: tuple[float, float]) -> NDArray[np.uint8]:
        """[layers, kv_heads]: what this sample alone would say.

        By its own sparsity (`paper`), or planned on its own curves with the `scales` of all samples
        (`measured`); without an interval, there is but one.
        """
        if self.conditions.recipe == "paper":
            sparsity = self.sparsity[sample, self._kappa]
            return classify.types_by_sparsity(sparsity, self.decision.theta, self.conditions.grid)
        alone = np.zeros(self.samples, dtype=np.int64)
        alone[sample] = 1
        return self.plan(alone, scales, whole=False).types

    def curves(self, counts: Counts) -> classify.Curves:
        """Means at every anchor, [anchors, strategies, layers, kv_heads, ratios]."""
        return _stacked([self._sampled(weights) for weights in self.anchors.of(counts)])

    def pooled(self, counts: Counts) -> classify.Curves:
        """Means over samples of all lengths, [strategies, layers, kv_heads, ratios]."""
        return self._sampled(counts.astype(np.float64)).curves

    def _sampled(self, weights: NDArray[np.float64]) -> Sampled:
        """Curves of samples of these weights, by the decision's risk; the output error is always
        its mean."""
        mean = self._mean(weights)
        risk, edges = self.decision.risk, None
        if not risk.is_mean:
            edges = np.zeros_like(mean[1:])
            there = mean[0] < INFEASIBLE
            for (term, number), ranked in self._ranked.items():
                worst, edges[term, number] = ranked.tail(weights, risk.level)
                mean[term + 1, number] = np.where(there[number], worst, float(INFEASIBLE))
        curves, tail = classify.Curves(*mean), 1.0 if risk.is_mean else 1 - risk.level
        return Sampled(self.losses, self.fits, weights, curves, edges, tail)

    @cached_property
    def _ranked(self) -> dict[tuple[int, int], Ranked]:
        """By term (0: output, 1: reply) and strategy."""
        places = np.ndindex(2, len(self._static))
        return {(t, s): Ranked(self.losses[:, t + 1, s], self.fits[:, 0, s]) for t, s in places}

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
