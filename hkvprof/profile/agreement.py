"""How far two decisions about the same heads agree, and how sure a share is. Pure functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.heads import HeadType

Z95 = 1.959963984540054
"""97.5% quantile of the standard normal distribution."""


def wilson(count: int, total: int) -> tuple[float, float]:
    """95% score interval of the share `count` / `total` (Wilson 1927, JASA 22, 209-212).

    For independent trials with one probability; unlike the normal approximation it stays within
    [0, 1] and has a width where all trials agree. `total` is at least 1.
    """
    assert 0 <= count <= total
    assert total > 0
    share, square = count / total, Z95**2 / total
    centre = (share + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def same_share(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Share of entries that are equal."""
    return float((first == second).mean())


def cohen_kappa(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Agreement beyond chance (Cohen 1960): (p_o - p_e) / (1 - p_e), in [-1, 1].

    p_o is the share of equal entries, p_e the one expected of independent decisions with the same
    shares of each type. Where both name one and the same type throughout, 0 / 0 counts as 1.
    """
    observed = same_share(first, second)
    kinds = np.union1d(first, second)
    expected = sum(float((first == k).mean()) * float((second == k).mean()) for k in kinds)
    if len(kinds) < 2:
        return 1.0
    return (observed - expected) / (1 - expected)


def jaccard(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Static heads of both over static heads of either; 1 where neither has any."""
    ours, theirs = first == HeadType.STATIC, second == HeadType.STATIC
    either = int((ours | theirs).sum())
    return float((ours & theirs).sum()) / either if either else 1.0


def spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Correlation of ranks, equal values sharing their mean rank (Spearman 1904), in [-1, 1].

    Without any spread there is no order: 1 where both are constant, 0 where one is.
    """
    ranks = [_ranks(values.ravel()) for values in (first, second)]
    ours, theirs = (rank - rank.mean() for rank in ranks)
    spread = math.sqrt(float((ours**2).sum()) * float((theirs**2).sum()))
    if spread == 0:
        return 1.0 if not ours.any() and not theirs.any() else 0.0
    return float(np.clip((ours * theirs).sum() / spread, -1, 1))


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[place])
