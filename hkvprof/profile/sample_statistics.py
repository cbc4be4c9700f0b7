"""What query heads attend to in one sample, and its mean over samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.checks import expect, require
from hkvprof.head_statistics import CLASSES, PAIRS, HeadStatistics, check_sums
from hkvprof.heads import HeadGrid

_BOUNDED = ("modality_mass", "entropy", "drift")


@dataclass(frozen=True, eq=False)
class SampleStatistics:
    """Of one sample; L layers, Hq query heads.

    `modality_mass` [CLASSES, L, Hq] and `entropy` [L, Hq] of its text rows
    (text_rows.TextStatistics), `drift` [PAIRS, L, Hq] (drift.layer_drift), 0 for the pairs that the
    sample does not have: `compared` [PAIRS] is 1 for those that it has.
    """

    modality_mass: NDArray[np.float32]
    entropy: NDArray[np.float32]
    drift: NDArray[np.float32]
    compared: NDArray[np.uint8]

    @classmethod
    def names(cls) -> list[str]:
        """Of the arrays, as they stand in a row's file."""
        return [entry.name for entry in fields(cls)]

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names."""
        return {name: getattr(self, name) for name in self.names()}

    @classmethod
    def take(cls, named: dict[str, NDArray[Any]]) -> SampleStatistics:
        """Move the arrays out of `named`. Raises KeyError."""
        return cls(**{name: named.pop(name) for name in cls.names()})

    def check(self, grid: HeadGrid) -> None:
        """Raise ProfileError unless shapes and bounds hold."""
        heads = (grid.layers, grid.query_heads)
        expect("modality_mass", self.modality_mass, (len(CLASSES), *heads), np.float32)
        expect("entropy", self.entropy, heads, np.float32)
        expect("drift", self.drift, (len(PAIRS), *heads), np.float32)
        expect("compared", self.compared, (len(PAIRS),), np.uint8)
        for name in _BOUNDED:
            values = getattr(self, name)
            within = bool((values >= 0).all()) and bool((values <= 1).all())
            require(within, f"{name} holds values outside [0, 1]")
        check_sums("modality_mass", self.modality_mass)
        require(bool((self.compared <= 1).all()), "compared holds more than 1")


def mean_statistics(samples: Iterable[SampleStatistics]) -> HeadStatistics:
    """Of one sample or more, in float64; drift over those that have the pair."""
    rows = list(samples)
    mass = np.stack([row.modality_mass for row in rows]).astype(np.float64)
    entropy = np.stack([row.entropy for row in rows]).astype(np.float64)
    compared = np.stack([row.compared for row in rows]).astype(np.int64)
    drift = np.zeros(rows[0].drift.shape)
    for row in rows:
        drift += row.drift.astype(np.float64) * row.compared[:, None, None]
    count = compared.sum(axis=0)
    return HeadStatistics(
        modality_mass_mean=mass.mean(axis=0).astype(np.float32),
        modality_mass_std=mass.std(axis=0).astype(np.float32),
        entropy_mean=entropy.mean(axis=0).astype(np.float32),
        entropy_std=entropy.std(axis=0).astype(np.float32),
        drift_mean=(drift / np.maximum(count, 1)[:, None, None]).astype(np.float32),
        drift_samples=count.astype(np.int32),
    )
