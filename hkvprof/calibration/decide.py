"""From merged statistics to types and budgets: the `paper` and the `measured` recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import UsageError
from hkvprof.heads import HeadGrid, HeadType, KeepRule, Strategy
from hkvprof.profile.budgets import INFEASIBLE, Allocation, scale_ratios


def paper_menu(chunk: int, text_prior: float) -> tuple[Strategy, Strategy]:
    """HybridKV: text-prior pruning; chunks of tokens behind their mean key. Raises UsageError."""
    if not 1 <= chunk <= 4096:
        raise UsageError(f"chunk is {chunk}: expected 1 to 4096 tokens (HybridKV: 16 to 64)")
    if not 0 <= text_prior <= 1:
        raise UsageError(f"text_prior is {text_prior}: expected a share in [0, 1]")
    return (
        Strategy(HeadType.STATIC, pool=1, text_prior=float(text_prior)),
        Strategy(HeadType.DYNAMIC, index="mean", chunk=chunk),
    )


PAPER_MENU = paper_menu(chunk=16, text_prior=0.5)
PAPER_CONSTANTS = {"theta": 0.9, "kappa": 0.10, "coefficient": 1.0, "chunk": 16, "text_prior": 0.5}
"""Defaults of the recipe's options."""


def refuse_paper_constants(recipe: str, given: Mapping[str, float]) -> None:
    """Raise UsageError where constants of `paper` are given to another recipe."""
    changed = [name for name, value in given.items() if value != PAPER_CONSTANTS[name]]
    if recipe != "paper" and changed:
        raise UsageError(
            f"{', '.join(changed)} belong to recipe 'paper', and the recipe is {recipe!r}: leave "
            "them out, or choose paper"
        )


RERANK = 64
"""Candidates beyond the hot buffer: more of them no longer help (docs/retrieval.md)."""

MEASURED_MENU = (
    Strategy(HeadType.STATIC, pool=1),
    Strategy(HeadType.STATIC, pool=7),
    Strategy(HeadType.STATIC, pool=31),
    Strategy(HeadType.DYNAMIC, index="projected", bits=16, rerank=RERANK),
    Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=RERANK),
    Strategy(HeadType.DYNAMIC, index="projected", bits=64, rerank=RERANK),
)
"""Static scores at three pooling widths, and the projected index at three sizes."""

MEASURED_KEEP = KeepRule(sinks=2, recent=4, window=16)
"""Fewer forced tokens than in the literature: scores and indexes find the useful ones themselves
(docs/experiments.md)."""

REPLY_WEIGHT, OUTPUT_WEIGHT, POWER = 1.0, 0.5, 0.5
"""Weights of the two terms (the reply knows what the answer depends on), and the root taken."""

REFERENCE_RATIO = 0.05
"""Where the two loss terms are brought to one scale."""

Z95 = 1.96


@dataclass(frozen=True)
class Curves:
    """Means over samples, [strategies, layers, kv_heads, ratios] (see statistics.LayerLosses)."""

    output: NDArray[np.float64]
    square: NDArray[np.float64]
    reply: NDArray[np.float64]


def loss_scales(curves: Curves, ratios: NDArray[np.float32]) -> tuple[float, float]:
    """Means over all heads of `square` and `reply` at the menu's first strategy (static) near
    REFERENCE_RATIO."""
    at = int(np.abs(ratios - REFERENCE_RATIO).argmin())
    return float(curves.square[0, :, :, at].mean()), float(curves.reply[0, :, :, at].mean())


def planning_loss(
    curves: Curves, ratios: NDArray[np.float32], scales: tuple[float, float] | None = None
) -> NDArray[np.float32]:
    """What planning minimises: root mean squares of the reply's and of the output's change.

    Each mean square is divided by its `scales` (default: `loss_scales` of these curves), whatever
    the model's scale. The root, because the errors of many heads pull a margin the same way and so
    add up by size, not by square (docs/experiments.md).
    """
    square, reply = loss_scales(curves, ratios) if scales is None else scales
    terms = ((curves.square, square, OUTPUT_WEIGHT), (curves.reply, reply, REPLY_WEIGHT))
    total = np.zeros_like(curves.square)
    for term, scale, weight in terms:
        total += weight * (term / max(scale, 1e-30)) ** POWER
    total = np.where(curves.output >= INFEASIBLE, float(INFEASIBLE), total)
    return np.minimum(total, float(INFEASIBLE)).astype(np.float32)


def classify_by_sparsity(
    mean: NDArray[np.float32], std: NDArray[np.float32], samples: int, theta: float, grid: HeadGrid
) -> NDArray[np.uint8]:
    """Types [layers, kv_heads] by HybridKV's rule: static when sparsity reaches `theta`.

    `mean`, `std` [layers, query_heads] over samples. Conservative twice: a group is static only if
    all of its query heads are, and a head whose 95% interval reaches below theta is dynamic (a
    wrong static loses data for good, a wrong dynamic costs milliseconds). One sample is no proof.
    """
    error = std / np.sqrt(samples - 1) if samples > 1 else np.full_like(std, np.inf)
    return types_by_sparsity(mean - Z95 * error, theta, grid)


def types_by_sparsity(
    sparsity: NDArray[np.float32], theta: float, grid: HeadGrid
) -> NDArray[np.uint8]:
    """Types [layers, kv_heads]: static where all query heads of the group reach `theta`."""
    static = (sparsity >= theta).reshape(grid.layers, grid.kv_heads, grid.group).all(axis=-1)
    return np.where(static, HeadType.STATIC, HeadType.DYNAMIC).astype(np.uint8)


def allocate_by_sparsity(
    types: NDArray[np.uint8], mean: NDArray[np.float32], share: float, floor: float, grid: HeadGrid,
    coefficient: float = 1.0,
) -> Allocation:  # fmt: skip
    """HybridKV's top-down budgets: first to the types, then static heads in proportion to their
    (group mean) sparsity, dynamic heads evenly.

    `coefficient` (r, which is not public) is the mean share of static heads over that of dynamic
    ones. No head keeps less than `floor` or more than everything; what that costs or frees is
    taken from or given to the others in proportion.
    """
    score = mean.reshape(grid.layers, grid.kv_heads, grid.group).mean(axis=-1).astype(np.float64)
    static = types == HeadType.STATIC
    weight = float(np.where(static, coefficient, 1.0).mean())
    ratio = np.full(types.shape, share / weight)
    if static.any():
        ratio[static] *= coefficient * score[static] / max(float(score[static].mean()), 1e-12)
    ratio = scale_ratios(np.maximum(ratio, 1e-6).astype(np.float32), share, floor)
    return Allocation(types.copy(), ratio, float("nan"))


T = TypeVar("T", bound=np.generic)
NO_PROOF = 1e6
"""Margin where fewer than two samples speak: more than any loss."""


@dataclass(frozen=True, eq=False)
class Sampled:
    """Curves of some samples and what they rest on.

    `losses`, `fits` [samples, 3 or 1 terms, strategies, layers, kv_heads, ratios] as in Evidence,
    `weights` [samples]; `edges` [2 terms, ...], where the mean is one of the worst part, the least
    value of that part, which is the share `tail` of the samples.
    """

    losses: NDArray[np.float32]
    fits: NDArray[np.bool_]
    weights: NDArray[np.float64]
    curves: Curves
    edges: NDArray[np.float64] | None = None
    tail: float = 1.0

    def term(self, sample: int, term: int) -> NDArray[np.float64]:
        """What a sample adds to the mean of a term, 1 (output) or 2 (reply): the weighted mean of
        these over samples is the curve, whatever the risk."""
        value = self.losses[sample, term].astype(np.float64)
        if self.edges is None:
            return value
        edge = self.edges[term - 1]
        return np.asarray(edge + np.maximum(value - edge, 0) / self.tail)


def static_margin(
    sampled: Sampled,
    ratios: NDArray[np.float32],
    scales: tuple[float, float],
    static: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Half the 95% interval of best static - best dynamic planning loss [layers, kv_heads, ratios].

    `static` [strategies]. The difference is paired: both losses are of the same samples. Its
    standard error is that of the planning loss linearised in the means of its terms (delta method),
    over samples that count by their weights. 0 where a type does not fit at all.
    """
    loss = planning_loss(sampled.curves, ratios, scales).astype(np.float64)
    ours, theirs = (_best(loss, kind) for kind in (static, ~static))
    slopes = _slopes(sampled.curves, scales)
    shape = loss.shape[1:]
    weight, square, spread = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for sample in sampled.weights.nonzero()[0].tolist():
        change = np.zeros_like(loss)
        for term, (slope, mean) in slopes.items():
            change += slope * (sampled.term(sample, term) - mean)
        fits = sampled.fits[sample, 0]
        own = np.where(_pick(fits, ours) & _pick(fits, theirs), sampled.weights[sample], 0.0)
        weight += own
        square += own**2
        spread += (own * (_pick(change, ours) - _pick(change, theirs))) ** 2
    alone = weight**2 <= square * (1 + 1e-9)
    variance = spread / np.where(alone, 1, weight**2 - square)
    margin = np.where(alone, NO_PROOF, Z95 * np.sqrt(variance))
    possible = np.maximum(_pick(loss, ours), _pick(loss, theirs)) < INFEASIBLE
    return np.where(possible, margin, 0).astype(np.float32)


def _best(loss: NDArray[np.float64], among: NDArray[np.bool_]) -> NDArray[np.intp]:
    """[layers, kv_heads, ratios]: the strategy of the least loss."""
    return np.where(among[:, None, None, None], loss, np.inf).argmin(axis=0)


def _slopes(
    curves: Curves, scales: tuple[float, float]
) -> dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """By term: derivative of the planning loss by the term's mean (0 where that is 0), the mean."""
    terms = ((curves.square, OUTPUT_WEIGHT), (curves.reply, REPLY_WEIGHT))
    found = {}
    for term, ((mean, weight), scale) in enumerate(zip(terms, scales, strict=True), start=1):
        there = (mean > 0) & (mean < INFEASIBLE)
        unit = max(scale, 1e-30)
        slope = weight * POWER * (np.where(there, mean, unit) / unit) ** (POWER - 1) / unit
        found[term] = (np.where(there, slope, 0.0), np.where(there, mean, 0.0))
    return found


def _pick(values: NDArray[T], choice: NDArray[np.intp]) -> NDArray[T]:
    """[layers, kv_heads, ratios] of the chosen strategy."""
    return np.take_along_axis(values, choice[None], axis=0)[0]


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
