"""What queries after a prompt look like, by the calibration: what calibrated static scores ask.

No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.heads import HeadGrid
from hkvprof.profile.bounds import expect, require
from hkvprof.profile.costs import centres_bytes

PREFIX = "queries."
MOST_CENTRES = 64
_KEYS = ("centres", "weights", "frequency")
_SUM = 1e-3
"""By how much float32 weights may miss a sum of 1."""


@dataclass(frozen=True, eq=False)
class QueryTables:
    """Centres of the queries of replies and of users' turns (docs/method.md, "Static scores").

    `centres` [layers, query_heads, centres, head_dim] float16, queries turned back to position 0;
    `weights` [layers, query_heads, centres] float32, the share of queries that each stands for, 1
    in all; `frequency` [pairs] float32, radians per position by which rotary embeddings turn pair
    j, channels j and j + pairs.
    """

    centres: NDArray[np.float16]
    weights: NDArray[np.float32]
    frequency: NDArray[np.float32]

    def head_bytes(self, group: int) -> int:
        """Device bytes of what one KV head asks, which `group` query heads share."""
        count, dim = self.centres.shape[2:]
        return centres_bytes(group, count, dim, len(self.frequency))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names in the file."""
        return {PREFIX + key: getattr(self, key) for key in _KEYS}

    @classmethod
    def take(cls, named: dict[str, NDArray[Any]]) -> QueryTables | None:
        """Move the arrays out of `named`; None where it has none. Raises KeyError."""
        if not any(name.startswith(PREFIX) for name in named):
            return None
        return cls(**{key: named.pop(PREFIX + key) for key in _KEYS})

    def check(self, grid: HeadGrid) -> None:
        """Raise ProfileError unless shapes are possible, weights are shares, and pairs can turn."""
        count = int(self.weights.shape[-1]) if self.weights.ndim == 3 else 0
        require(
            1 <= count <= MOST_CENTRES, f"expected 1 to {MOST_CENTRES} query centres, found {count}"
        )
        heads = (grid.layers, grid.query_heads, count)
        expect("queries.centres", self.centres, (*heads, grid.head_dim), np.float16)
        expect("queries.weights", self.weights, heads, np.float32)
        total = self.weights.astype(np.float64).sum(axis=-1)
        shares = bool((self.weights >= 0).all()) and bool((abs(total - 1) <= _SUM).all())
        require(shares, "queries.weights are not shares that sum to 1")
        check_frequency("queries.frequency", self.frequency, grid)


def check_frequency(name: str, frequency: NDArray[np.float32], grid: HeadGrid) -> None:
    """Raise ProfileError unless rotary pairs of heads of this width can turn so."""
    pairs = len(frequency) if frequency.ndim == 1 else 0
    most = grid.head_dim // 2
    require(1 <= pairs <= most, f"{name} has {pairs} pairs, expected 1 to {most}")
    expect(name, frequency, (pairs,), np.float32)
    turns = bool((frequency > 0).all()) and bool((frequency <= np.pi).all())
    require(turns, f"{name} holds values outside (0, pi]")
