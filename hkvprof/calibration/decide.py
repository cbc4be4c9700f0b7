"""From merged statistics to types and budgets: the `paper` and the `measured` recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hkvprof.heads import HeadGrid, HeadType
from hkvprof.profile.budgets import INFEASIBLE, Allocation
from hkvprof.profile.dealing import scale_ratios

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
    """What planning minimises: roots of the mean squares of the reply's and output's change.

    Each mean square is divided by its `scales` (default: `loss_scales` of these curves), whatever
    the model's scale. Roots make sizes of squares, since errors pull a margin the same way.
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
    `weights` [samples].
    """

    losses: NDArray[np.float32]
    fits: NDArray[np.bool_]
    weights: NDArray[np.float64]
    curves: Curves


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
    used = sampled.weights.nonzero()[0][:, None, None, None]
    fits = _of_samples(sampled.fits[:, 0], used, ours) & _of_samples(
        sampled.fits[:, 0], used, theirs
    )
    own = np.where(fits, sampled.weights[used], 0.0)
    change = _change(sampled, scales, used, ours) - _change(sampled, scales, used, theirs)
    weight, square, spread = own.sum(0), (own**2).sum(0), ((own * change) ** 2).sum(0)
    alone = weight**2 <= square * (1 + 1e-9)
    variance = spread / np.where(alone, 1, weight**2 - square)
    margin = np.where(alone, NO_PROOF, Z95 * np.sqrt(variance))
    possible = np.maximum(_pick(loss, ours), _pick(loss, theirs)) < INFEASIBLE
    return np.where(possible, margin, 0).astype(np.float32)


def _change(
    sampled: Sampled,
    scales: tuple[float, float],
    used: NDArray[np.intp],
    choice: NDArray[np.intp],
) -> NDArray[np.float64]:
    """[used samples, layers, kv_heads, ratios]: by how much each sample's planning loss of the
    chosen strategy differs from the mean's, to first order."""
    curves, total = sampled.curves, np.zeros((len(used), *choice.shape))
    terms = ((curves.square, OUTPUT_WEIGHT), (curves.reply, REPLY_WEIGHT))
    for term, ((means, weight), scale) in enumerate(zip(terms, scales, strict=True), start=1):
        own = _of_samples(sampled.losses[:, term], used, choice)
        slope, mean = _slope(_pick(means, choice), weight, max(scale, 1e-30))
        total += slope * (own - mean)
    return total


def _slope(
    mean: NDArray[np.float64], weight: float, unit: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Derivative of the planning loss by a term's mean, and the mean; both 0 where it says nothing.

    `weight` and `unit` are the term's in `planning_loss`.
    """
    there = (mean > 0) & (mean < INFEASIBLE)
    slope = weight * POWER * (np.where(there, mean, unit) / unit) ** (POWER - 1) / unit
    return np.where(there, slope, 0.0), np.where(there, mean, 0.0)


def _best(loss: NDArray[np.float64], among: NDArray[np.bool_]) -> NDArray[np.intp]:
    """[layers, kv_heads, ratios]: the strategy of the least loss."""
    return np.where(among[:, None, None, None], loss, np.inf).argmin(axis=0)


def _pick(values: NDArray[T], choice: NDArray[np.intp]) -> NDArray[T]:
    """[layers, kv_heads, ratios] of the chosen strategy."""
    return np.take_along_axis(values, choice[None], axis=0)[0]


def _of_samples(values: NDArray[T], used: NDArray[np.intp], choice: NDArray[np.intp]) -> NDArray[T]:
    """[used samples, layers, kv_heads, ratios] of the chosen strategy; `used` [n, 1, 1, 1]."""
    found: NDArray[T] = values[used, choice, *np.indices(choice.shape, sparse=True)]
    return found
