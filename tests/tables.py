"""Projected-index tables fitted to given queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from hkvprof.calibration.index_fit import Moments, tables_of_layer
from hkvprof.heads import HeadGrid
from hkvprof.profile.record import ProjectedIndexTables
from hkvprof.selection.index import HeadTables

SIZES = (16, 32, 64)


def fit_arrays(query: Tensor, key: Tensor, sizes: tuple[int, ...] = SIZES) -> ProjectedIndexTables:
    """The profile's arrays for one layer with one head; `query`, `key` [tokens, dim]."""
    moments = Moments(HeadGrid(layers=1, query_heads=1, kv_heads=1, head_dim=key.shape[1]))
    moments.add_queries(0, query[None], 1.0)
    moments.add_keys(0, key[None], "sample")
    return moments.fit(sizes)


def fit_tables(query: Tensor, key: Tensor, sizes: tuple[int, ...] = SIZES) -> dict[int, HeadTables]:
    """One head's tables by size."""
    loaded = tables_of_layer(fit_arrays(query, key, sizes), 0, torch.device("cpu"))
    return {size: tables for (_, size), tables in loaded.items()}
