"""The larger parts of a profile: constants of the projected index, and what query heads attend to.

No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.heads import HeadGrid
from hkvprof.profile.bounds import expect, require
from hkvprof.profile.costs import table_bytes
from hkvprof.profile.queries import check_frequency

_KEYS = ("key_projection", "query_projection", "key_mean", "deviation")
_TURNING = ("key_bias", "frequency", "axis")


@dataclass(frozen=True)
class ProjectedIndexTables:
    """Constants of the projected index, per KV head (method: docs/method.md).

    `key_projection`, `query_projection` [layers, kv_heads, head_dim, channels] float16; `key_mean`
    [layers, kv_heads, head_dim] float32; `deviation` [layers, kv_heads, channels] float32, the
    standard deviation of every projected key channel. Per size in `sizes` (bits per token), for its
    leading channels C: `codebooks` int8 [layers, kv_heads, 256, C], centroids in CODE_UNITs of the
    deviation (selection.quantiser); `subspaces` uint8 [layers, kv_heads, C], a channel's code.

    Where keys have a bias that turns with their positions (selection.rotary), all else is about
    keys without it: `key_bias` [layers, kv_heads, head_dim] float32 before the rotation, 0 but in
    the pairs that are taken out; `frequency` [pairs] float32, radians per position; `axis` [pairs]
    uint8, the component of positions that turns a pair. Pair j is channels j and j + pairs.
    """

    sizes: tuple[int, ...]
    key_projection: NDArray[np.float16]
    query_projection: NDArray[np.float16]
    key_mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    codebooks: tuple[NDArray[np.int8], ...]
    subspaces: tuple[NDArray[np.uint8], ...]
    key_bias: NDArray[np.float32] | None = None
    frequency: NDArray[np.float32] | None = None
    axis: NDArray[np.uint8] | None = None

    @property
    def pairs(self) -> int:
        """The largest number of rotary pairs that a head's bias has; 0 without biases."""
        if self.key_bias is None or self.frequency is None:
            return 0
        turning = len(self.frequency)
        halves = self.key_bias[..., :turning], self.key_bias[..., turning : 2 * turning]
        held = (halves[0] != 0) | (halves[1] != 0)
        return int(held.sum(axis=-1).max())

    @property
    def axes(self) -> int:
        """Axes of the positions that a prompt's index may have to be told token by token: 0 where
        positions count up, and without biases."""
        return 0 if self.axis is None or not self.axis.any() else int(self.axis.max()) + 1

    @property
    def head_bytes(self) -> dict[int, int]:
        """Device bytes of one head's tables by index size (bits per token)."""
        dim = self.key_mean.shape[-1]
        used = (owner.shape[-1] for owner in self.subspaces)
        pairs = self.pairs
        return {size: table_bytes(dim, n, pairs) for size, n in zip(self.sizes, used, strict=True)}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names in the file."""
        named: dict[str, NDArray[Any]] = {f"index.{key}": getattr(self, key) for key in _KEYS}
        per_size = zip(self.sizes, self.codebooks, self.subspaces, strict=True)
        for size, codebook, owner in per_size:
            named |= {f"index.codebook_{size}": codebook, f"index.subspace_{size}": owner}
        turning = {f"index.{key}": getattr(self, key) for key in _TURNING}
        return named | {name: array for name, array in turning.items() if array is not None}

    @classmethod
    def take(cls, sizes: tuple[int, ...], named: dict[str, NDArray[Any]]) -> ProjectedIndexTables:
        """Move the arrays of these sizes out of `named`. Raises KeyError."""
        return cls(
            sizes=sizes,
            codebooks=tuple(named.pop(f"index.codebook_{size}") for size in sizes),
            subspaces=tuple(named.pop(f"index.subspace_{size}") for size in sizes),
            **{key: named.pop(f"index.{key}") for key in _KEYS},
            **{key: named.pop(f"index.{key}") for key in _TURNING if f"index.{key}" in named},
        )

    def check(self, grid: HeadGrid) -> None:
        """Raise ProfileError unless sizes, shapes and the numbers of codes are possible."""
        heads = (grid.layers, grid.kv_heads)
        known = all(type(size) is int and size in (16, 32, 64) for size in self.sizes)
        require(
            known and len(set(self.sizes)) == len(self.sizes),
            f"index sizes must be different ones of 16, 32, 64 bits, found {self.sizes!r}",
        )
        channels = _last_extent(self.deviation, 3)
        require(1 <= channels <= 64, f"expected 1 to 64 index channels, found {channels}")
        for name in ("key_projection", "query_projection"):
            expect(
                f"index.{name}", getattr(self, name), (*heads, grid.head_dim, channels), np.float16
            )
        expect("index.key_mean", self.key_mean, (*heads, grid.head_dim), np.float32)
        expect("index.deviation", self.deviation, (*heads, channels), np.float32)
        require(bool((self.deviation >= 0).all()), "index.deviation holds negative values")
        require(
            len(self.codebooks) == len(self.subspaces) == len(self.sizes),
            f"expected a codebook and its subspaces for each of {len(self.sizes)} index sizes",
        )
        for size, codebook, owner in zip(self.sizes, self.codebooks, self.subspaces, strict=True):
            used = _last_extent(owner, 3)
            require(
                1 <= used <= channels,
                f"index.subspace_{size} has {used} channels, expected 1 to {channels}",
            )
            expect(f"index.subspace_{size}", owner, (*heads, used), np.uint8)
            expect(f"index.codebook_{size}", codebook, (*heads, 256, used), np.int8)
            require(
                bool((owner < size // 8).all()),
                f"index.subspace_{size} holds numbers beyond its {size // 8} codes",
            )
        self._check_bias(grid)

    def _check_bias(self, grid: HeadGrid) -> None:
        """Raise ProfileError unless biases can be turned, or there are none."""
        found = [f"index.{key}" for key in _TURNING if getattr(self, key) is not None]
        if self.key_bias is None or self.frequency is None or self.axis is None:
            require(not found, f"expected all or none of index.{', index.'.join(_TURNING)}")
            return
        expect(
            "index.key_bias", self.key_bias, (grid.layers, grid.kv_heads, grid.head_dim), np.float32
        )
        check_frequency("index.frequency", self.frequency, grid)
        pairs = len(self.frequency)
        expect("index.axis", self.axis, (pairs,), np.uint8)
        require(bool((self.axis < 3).all()), "index.axis holds numbers beyond its 3 axes")
        still = self.key_bias[..., 2 * pairs :]
        require(not still.any(), "index.key_bias is not 0 in channels that do not turn")
        require(self.pairs > 0, "index.key_bias is 0 throughout: expected none, or a bias")


def _last_extent(array: NDArray[Any], dimensions: int) -> int:
    """The last extent of an array of so many dimensions, else 0."""
    return int(array.shape[-1]) if array.ndim == dimensions else 0


CLASSES = ("sinks", "text", "image", "video", "recent")
"""Where attention goes, disjoint: the first tokens of the prompt, the last ones that the row sees
(KeepRule), and by modality what lies between."""
PAIRS = ("window_decoding", "window_later", "decoding_later")
"""Whose kept sets are compared: the prompt's last rows, the rows that decode the reply, and those
that decode answers to later questions."""
PREFIX = "statistics."
_SUM = 1e-3
"""By how much float32 means of masses may miss a sum of 1."""


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """Means and standard deviations over samples; L layers, Hq query heads.

    - `modality_mass_mean`, `modality_mass_std` [CLASSES, L, Hq] float32: share of the attention of
      text rows, over the classes 1 in all.
    - `entropy_mean`, `entropy_std` [L, Hq] float32: entropy of these rows over the logarithm of the
      number of visible keys, in [0, 1].
    - `drift_mean` [PAIRS, L, Hq] float32: overlap of two kept sets, in [0, 1], over the
      `drift_samples` [PAIRS] int32 that have both; 0 where none has.
    """

    modality_mass_mean: NDArray[np.float32]
    modality_mass_std: NDArray[np.float32]
    entropy_mean: NDArray[np.float32]
    entropy_std: NDArray[np.float32]
    drift_mean: NDArray[np.float32]
    drift_samples: NDArray[np.int32]

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names in the file."""
        return {PREFIX + entry.name: getattr(self, entry.name) for entry in fields(self)}

    @classmethod
    def take(cls, named: dict[str, NDArray[Any]]) -> HeadStatistics | None:
        """Move the arrays out of `named`; None where it has none. Raises KeyError."""
        if not any(name.startswith(PREFIX) for name in named):
            return None
        return cls(**{entry.name: named.pop(PREFIX + entry.name) for entry in fields(cls)})

    def check(self, grid: HeadGrid) -> None:
        """Raise ProfileError unless shapes and bounds hold."""
        heads = (grid.layers, grid.query_heads)
        shapes = {
            "modality_mass_mean": (len(CLASSES), *heads),
            "modality_mass_std": (len(CLASSES), *heads),
            "entropy_mean": heads,
            "entropy_std": heads,
            "drift_mean": (len(PAIRS), *heads),
        }
        for name, shape in shapes.items():
            values = getattr(self, name)
            expect(PREFIX + name, values, shape, np.float32)
            within = bool((values >= 0).all()) and bool((values <= 1).all())
            require(within, f"{PREFIX}{name} holds values outside [0, 1]")
        check_sums(PREFIX + "modality_mass_mean", self.modality_mass_mean)
        expect(PREFIX + "drift_samples", self.drift_samples, (len(PAIRS),), np.int32)
        require(bool((self.drift_samples >= 0).all()), f"{PREFIX}drift_samples holds less than 0")
        require(
            not self.drift_mean[self.drift_samples == 0].any(),
            f"{PREFIX}drift_mean is not 0 for a pair that no sample has",
        )


def check_sums(name: str, mass: NDArray[np.float32]) -> None:
    """Raise ProfileError unless masses [CLASSES, ...] add up to 1."""
    total = mass.astype(np.float64).sum(axis=0)
    require(bool((abs(total - 1) <= _SUM).all()), f"{name} does not sum to 1 over its classes")
