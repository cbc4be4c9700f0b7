"""Queries of replies and of users' turns over calibration samples, and the centres of them.

A calibrated static score (selection.static.QueryCentres) asks these in place of a prompt's last
rows. They are clustered as they were before rotary embeddings turned them.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.calibration.fitted import FittedTables
from hkvprof.calibration.index_fit import KeySample, Moments
from hkvprof.heads import HeadGrid
from hkvprof.profile.queries import QueryTables
from hkvprof.selection.rotary import Positions, Turning
from hkvprof.selection.static import QueryCentres

CENTRES = 16
"""Centres per query head: asking them costs what a window of as many rows does, and twice as many
are hardly better (docs/experiments.md, "Contexts without a question")."""
SAMPLED = 1024
"""Queries per head that centres are fitted to."""
ROUNDS = 25
"""Most rounds of Lloyd's algorithm."""


class QuerySamples:
    """Queries of every layer drawn evenly from all samples, turned back to position 0."""

    def __init__(self, grid: HeadGrid, turning: Turning) -> None:
        self.turning = turning
        self._drawn = [KeySample(SAMPLED) for _ in range(grid.layers)]

    def add(
        self,
        layer: int,
        query: Float[Tensor, "query_heads rows dim"],
        positions: Positions,
        sample: str,
    ) -> None:
        """Offer the queries of the sample of that id, which stand at these positions."""
        self._drawn[layer].add(self.turning.undone(query, positions), sample)

    def fit(self) -> QueryTables:
        """Centres and their shares for every query head."""
        fits = [clusters(layer.keys.float(), CENTRES) for layer in self._drawn]
        return QueryTables(
            centres=np.stack([centres.half().numpy() for centres, _ in fits]),
            weights=np.stack([weights.numpy() for _, weights in fits]),
            frequency=self.turning.frequency,
        )


def fitted(moments: Moments, queries: QuerySamples | None, sizes: tuple[int, ...]) -> FittedTables:
    """Everything that is fitted to what the samples showed; indexes of these sizes."""
    return FittedTables(moments.fit(sizes), None if queries is None else queries.fit())


def centres_of_layer(
    tables: QueryTables | None, layer: int, grid: HeadGrid, device: torch.device
) -> list[QueryCentres]:
    """The centres of one layer's KV heads on `device`; none where there are no tables."""
    if tables is None:
        return []
    groups = [slice(i * grid.group, (i + 1) * grid.group) for i in range(grid.kv_heads)]
    return [QueryCentres.load(tables, layer, group, device) for group in groups]


def clusters(
    points: Float[Tensor, "heads points dim"], count: int
) -> tuple[Float[Tensor, "heads count dim"], Float[Tensor, "heads count"]]:
    """Centres of so many clusters of every head's points, and the shares of points in them.

    k-means++ by a fixed seed, then Lloyd's algorithm; a cluster that loses its last point keeps its
    centre, at a share of 0. The same points in the same order give the same centres.
    """
    centres = _seeds(points, count)
    owner = _nearest(points, centres)
    for _ in range(ROUNDS):
        member = torch.nn.functional.one_hot(owner, count).to(points.dtype)
        size = member.sum(dim=1)[..., None]
        means = member.transpose(1, 2) @ points / size.clamp(min=1)
        centres = torch.where(size > 0, means, centres)
        before, owner = owner, _nearest(points, centres)
        if torch.equal(before, owner):
            break
    member = torch.nn.functional.one_hot(owner, count).to(points.dtype)
    return centres, member.mean(dim=1)


def _seeds(points: Tensor, count: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, SODA 2007): each next one is drawn by its squared
    distance from those before."""
    random = torch.Generator().manual_seed(0)
    heads = torch.arange(len(points))
    first = points[heads, torch.randint(points.shape[1], (len(points),), generator=random)]
    centres = [first]
    distance = (points - first[:, None]).square().sum(dim=-1)
    for _ in range(count - 1):
        chance = distance + 1e-12  # points may all be alike
        new = points[heads, torch.multinomial(chance, 1, generator=random)[:, 0]]
        centres.append(new)
        distance = torch.minimum(distance, (points - new[:, None]).square().sum(dim=-1))
    return torch.stack(centres, dim=1)


def _nearest(points: Tensor, centres: Tensor) -> Int[Tensor, "heads points"]:
    squares = centres.square().sum(dim=-1)[:, None]
    return (squares - 2 * points @ centres.transpose(1, 2)).argmin(dim=-1)
