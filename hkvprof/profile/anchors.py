"""Prompt lengths at which a profile keeps curves, and how much each sample says about each.

What a head loses at a share changes with the prompt's length. Samples come in many lengths, so that
every sample counts at the two anchors around its own, by its distance in log length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
