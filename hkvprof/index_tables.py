"""Constants of the projected index: a part of a profile. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.policy.costs import table_bytes

_KEYS = ("key_projection", "query_projection", "key_mean", "deviation")


@dataclass(frozen=True)
class ProjectedIndexTables:
    """Constants of the projected index, per KV head (method: docs/method.md).

    `key_projection`, `query_projection` [layers, kv_heads, head_dim, channels] float16; `key_mean`
    [layers, kv_heads, head_dim] float32; `deviation` [layers, kv_heads, channels] float32, the
    standard deviation of every projected key channel. Per size in `sizes` (bits per token), for its
    leading channels C: `codebooks` int8 [layers, kv_heads, 256, C], centroids in CODE_UNITs of the
    deviation (policy/quantiser.py); `subspaces` uint8 [layers, kv_heads, C], the code of a channel.
    """

    sizes: tuple[int, ...]
    key_projection: NDArray[np.float16]
    query_projection: NDArray[np.float16]
    key_mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    codebooks: tuple[NDArray[np.int8], ...]
    subspaces: tuple[NDArray[np.uint8], ...]

    @property
    def head_bytes(self) -> dict[int, int]:
        """Device bytes of one head's tables by index size (bits per token)."""
        dim = self.key_mean.shape[-1]
        used = (owner.shape[-1] for owner in self.subspaces)
        return {size: table_bytes(dim, n) for size, n in zip(self.sizes, used, strict=True)}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names in the file."""
        named: dict[str, NDArray[Any]] = {f"index.{key}": getattr(self, key) for key in _KEYS}
        per_size = zip(self.sizes, self.codebooks, self.subspaces, strict=True)
        for size, codebook, owner in per_size:
            named |= {f"index.codebook_{size}": codebook, f"index.subspace_{size}": owner}
        return named

    @classmethod
    def take(cls, sizes: tuple[int, ...], named: dict[str, NDArray[Any]]) -> ProjectedIndexTables:
        """Move the arrays of these sizes out of `named`. Raises KeyError."""
        return cls(
            sizes=sizes,
            codebooks=tuple(named.pop(f"index.codebook_{size}") for size in sizes),
            subspaces=tuple(named.pop(f"index.subspace_{size}") for size in sizes),
            **{key: named.pop(f"index.{key}") for key in _KEYS},
        )
