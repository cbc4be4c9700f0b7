"""Moments of queries and keys over calibration samples, and the projected index fitted to them."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.artifact import ProjectedIndexTables
from hkvprof.heads import HeadGrid
from hkvprof.policy.index import FittedTables, HeadTables, fit_projection


class Moments:
    """Running second moments per KV head, in float64 on the host.

    Queries: sum over rows and group of (scaling * q)(scaling * q)^T; keys: sums for mean and
    covariance. Adding samples in another order changes results by rounding only.
    """

    def __init__(self, grid: HeadGrid) -> None:
        shape = (grid.layers, grid.kv_heads, grid.head_dim)
        self.group = grid.group
        self.query = torch.zeros(*shape, grid.head_dim, dtype=torch.float64)
        self.query_rows = torch.zeros(grid.layers, dtype=torch.float64)
        self.key = torch.zeros(*shape, grid.head_dim, dtype=torch.float64)
        self.key_sum = torch.zeros(shape, dtype=torch.float64)
        self.key_rows = torch.zeros(grid.layers, dtype=torch.float64)

    def add_queries(
        self, layer: int, query: Float[Tensor, "query_heads rows dim"], scaling: float
    ) -> None:
        """Count rows of scaled queries."""
        heads, rows, dim = query.shape
        grouped = (query.float() * scaling).reshape(heads // self.group, self.group * rows, dim)
        self.query[layer] += (grouped.transpose(1, 2) @ grouped).double().cpu()
        self.query_rows[layer] += self.group * rows

    def add_keys(self, layer: int, key: Float[Tensor, "kv_heads tokens dim"]) -> None:
        """Count prompt keys."""
        key = key.float()
        self.key[layer] += (key.transpose(1, 2) @ key).double().cpu()
        self.key_sum[layer] += key.sum(dim=1).double().cpu()
        self.key_rows[layer] += key.shape[1]

    def fit(self, sizes: tuple[int, ...]) -> ProjectedIndexTables:
        """Projections, deviations and bits for every head."""
        layers, kv_heads = self.key_sum.shape[:2]
        mean = self.key_sum / self.key_rows[:, None, None]
        covariance = (
            self.key / self.key_rows[:, None, None, None] - mean[..., None] * mean[..., None, :]
        )
        moment = self.query / self.query_rows[:, None, None, None]
        fitted = [
            [fit_projection(moment[i, j], covariance[i, j], sizes) for j in range(kv_heads)]
            for i in range(layers)
        ]
        bits = [[[fit.bits[size] for fit in row] for row in fitted] for size in sizes]
        return ProjectedIndexTables(
            sizes=sizes,
            key_projection=_stack(fitted, "key_projection").astype(np.float16),
            query_projection=_stack(fitted, "query_projection").astype(np.float16),
            key_mean=mean.float().numpy(),
            deviation=_stack(fitted, "deviation"),
            bits=np.array(bits, dtype=np.uint8),
        )


def _stack(fitted: list[list[FittedTables]], name: str) -> NDArray[np.float32]:
    return np.stack([np.stack([getattr(fit, name).numpy() for fit in row]) for row in fitted])


def tables_of_layer(
    tables: ProjectedIndexTables, layer: int, device: torch.device
) -> dict[tuple[int, int], HeadTables]:
    """The constants of one layer's heads by (head, bits), as float32 on `device`."""
    heads = range(tables.deviation.shape[1])
    return {
        (head, size): HeadTables.load(tables, layer, head, size, device)
        for size in tables.sizes
        for head in heads
    }
