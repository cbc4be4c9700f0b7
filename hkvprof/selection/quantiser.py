"""Product quantisation of projected keys (Jegou et al., PAMI 2011): fitting and encoding.

The channels of a projection are dealt to one-byte codes; a code names one of 256 centroids of its
channels. The projection is query-aware (docs/method.md), so plain Euclidean error is the expected
squared error of a logit, and plain k-means is what minimises it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.profile.costs import CENTROIDS

MAX_CHANNELS = 32
CHANNELS = {16: 16, 32: 24, 64: 32}
"""Leading channels that an index of so many bits per token describes."""
CODE_UNIT = 6 / 127
"""Unit of stored centroids, in standard deviations of their channel: int8 reaches to 6."""

ROUNDS, ITERATIONS = 16, 12
Subspaces = tuple[tuple[int, int], ...]
"""Per code: its first channel and one past its last."""
Encoder = Callable[[Tensor, Tensor, Subspaces], Tensor]
"""`encode`, or something faster that does the same."""


def encode(
    projected: Float[Tensor, "tokens channels"],
    codebook: Float[Tensor, "centroids channels"],
    subspaces: Subspaces,
) -> UInt8[Tensor, "tokens codes"]:
    """The nearest centroid of every code's channels; 0 where a code has none.

    Takes 1 KiB of temporary memory per token. NaN and infinite channels count as 0.
    """
    codes = torch.zeros(len(projected), len(subspaces), dtype=torch.uint8, device=projected.device)
    projected = torch.nan_to_num(projected, nan=0.0, posinf=0.0, neginf=0.0)
    for code, (first, end) in enumerate(subspaces):
        if end > first:
            codes[:, code] = nearest(projected[:, first:end], codebook[:, first:end])
    return codes


def nearest(
    points: Float[Tensor, "points channels"], centroids: Float[Tensor, "centroids channels"]
) -> Int[Tensor, " points"]:
    """Number of the nearest centroid: the least |c|^2 / 2 - x . c."""
    half = (centroids * centroids).sum(dim=1) / 2
    return torch.addmm(half, points, centroids.T, alpha=-1).min(dim=1).indices


@dataclass(frozen=True)
class FittedProjection:
    """Result of `fit_projection` for one head, rounded as profiles store it."""

    key_projection: Float[Tensor, "dim channels"]
    query_projection: Float[Tensor, "dim channels"]
    deviation: Float[Tensor, " channels"]


def fit_projection(
    query_moment: Float[Tensor, "dim dim"],
    key_covariance: Float[Tensor, "dim dim"],
    shrink: float = 0.05,
) -> FittedProjection:
    """Query-aware projections of keys (docs/method.md), in float64, rounded to float16.

    `query_moment` is the second moment of the group's scaled queries, shrunk by `shrink` of its
    mean diagonal; `key_covariance` that of post-RoPE keys. With M = Cq^(1/2) Ck Cq^(1/2) and its
    leading eigenvectors W, keys are projected by Cq^(1/2) W and queries by Cq^(-1/2) W.
    """
    moment = query_moment.double()
    dim = len(moment)
    ridge = shrink * moment.diagonal().mean().clamp(min=1e-12)
    values, vectors = torch.linalg.eigh(moment + ridge * torch.eye(dim, dtype=moment.dtype))
    root = vectors * values.clamp(min=1e-12).sqrt() @ vectors.T
    inverse = vectors / values.clamp(min=1e-12).sqrt() @ vectors.T
    variance, basis = torch.linalg.eigh(root @ key_covariance.double() @ root)
    channels = min(MAX_CHANNELS, dim)
    basis = basis.flip(-1)[:, :channels]
    return FittedProjection(
        key_projection=(root @ basis).half().float(),
        query_projection=(inverse @ basis).half().float(),
        deviation=variance.flip(-1)[:channels].clamp(min=0).sqrt().float(),
    )


def fit_codebook(
    projected: Float[Tensor, "samples channels"], deviation: Float[Tensor, " channels"], bits: int
) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """Centroids [256, used] in CODE_UNITs of `deviation`, and the code of every used channel.

    `projected` are sampled keys as the runtime projects them, in an order that means nothing.
    """
    used = min(CHANNELS[bits], len(deviation))
    deviation = deviation[:used]
    owner = deal_channels(deviation.tolist(), bits // 8)
    unit = deviation * CODE_UNIT
    stored = torch.zeros(CENTROIDS, used)
    for code in sorted(set(owner)):
        mine = [channel for channel, other in enumerate(owner) if other == code]
        stored[:, mine] = k_means(projected[:, mine]) / unit[mine].clamp(min=1e-30)
    stored = torch.nan_to_num(stored).round().clamp(-127, 127)
    return stored.to(torch.int8).numpy(), np.array(owner, dtype=np.uint8)


def deal_channels(deviation: list[float], codes: int) -> list[int]:
    """The code of every channel, such that products of variances are alike (OPQ, CVPR 2013).

    Widest channel first, each to the code with the least product so far; no code gets more than its
    even share, rounded up.
    """
    least = max(max(deviation) * 1e-6, 1e-30)
    spread = [np.log(max(sd, least) / least) + 1e-3 for sd in deviation]
    room = -(-len(deviation) // codes)
    owner, total, count = [0] * len(deviation), [0.0] * codes, [0] * codes
    for channel in sorted(range(len(deviation)), key=lambda c: (-deviation[c], c)):
        free = [code for code in range(codes) if count[code] < room]
        best = min(free, key=lambda code: (total[code], code))
        owner[channel] = best
        total[best] += spread[channel]
        count[best] += 1
    return owner


def k_means(points: Float[Tensor, "points channels"]) -> Float[Tensor, "centroids channels"]:
    """CENTROIDS centres of `points`, in float32: k-means++ in ROUNDS, then Lloyd's iterations.

    A centre that lost its points moves to a point drawn as k-means++ draws.
    """
    generator = torch.Generator().manual_seed(0)
    points = torch.nan_to_num(points.float(), nan=0.0, posinf=0.0, neginf=0.0)

    def draw(centres: Tensor, place: Tensor, count: int) -> Tensor:
        error = ((points - centres[place]) ** 2).sum(dim=1).clamp(min=1e-30)
        return points[torch.multinomial(error, count, replacement=True, generator=generator)]

    centres = points[:1]
    for number in range(ROUNDS):
        wanted = CENTROIDS * (number + 1) // ROUNDS - len(centres)
        centres = torch.cat([centres, draw(centres, nearest(points, centres), wanted)])
    for _ in range(ITERATIONS):
        place = nearest(points, centres)
        count = torch.bincount(place, minlength=CENTROIDS)
        sums = torch.zeros_like(centres).index_add_(0, place, points)
        alive = count > 0
        if not bool(alive.all()):
            centres[~alive] = draw(centres, place, int((~alive).sum()))
        centres[alive] = sums[alive] / count[alive, None]
    return centres
