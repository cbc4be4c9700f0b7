"""By how much static must beat dynamic before samples prove it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hkvprof.policy.budget import INFEASIBLE
from hkvprof.profile.classify import OUTPUT_WEIGHT, POWER, REPLY_WEIGHT, Z95, Curves, planning_loss

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
