"""What query heads attend to, over the samples of a calibration: a part of a profile. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.checks import expect, require
from hkvprof.heads import HeadGrid

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
