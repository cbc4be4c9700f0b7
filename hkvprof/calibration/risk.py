"""What is expected of many samples: the mean of a loss, or the mean of its worst part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import UsageError

KINDS = ("mean", "cvar")


@dataclass(frozen=True)
class Risk:
    """`mean`, or `cvar`: the mean over the worst 1 - `level` of the samples (conditional value at
    risk; Rockafellar and Uryasev 2000). Raises UsageError."""

    kind: str = "mean"
    level: float = 0.9

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown risk {self.kind!r}: expected one of {', '.join(KINDS)}")
        if not 0 < self.level < 1:
            raise UsageError(f"the level of a risk must lie in (0, 1), found {self.level}")

    @property
    def is_mean(self) -> bool:
        """Whether all samples count alike."""
        return self.kind == "mean"

    def __str__(self) -> str:
        return "mean" if self.is_mean else f"{self.kind} {self.level:g}"


class Ranked:
    """Losses [samples, ...] from the largest to the least, for means of the worst under many
    weights; points that do not fit a sample never count."""

    def __init__(self, losses: NDArray[np.float32], fits: NDArray[np.bool_]) -> None:
        order = np.argsort(-losses, axis=0, kind="stable")
        self._order = order.astype(np.int32)
        self._losses = np.take_along_axis(losses, order, axis=0)
        self._fits = np.take_along_axis(fits, order, axis=0)

    def tail(
        self, weights: NDArray[np.float64], level: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weighted mean of the largest 1 - `level` of every point, and the least loss in there.

        `weights` [samples]; the loss at the edge counts with the part of its weight that lies
        within. 0 where nothing fits.
        """
        weight = weights[self._order] * self._fits
        reached = np.cumsum(weight, axis=0)
        room = (1 - level) * reached[-1]
        taken = np.clip(room - (reached - weight), 0, weight)
        mean = (taken * self._losses).sum(axis=0) / np.where(room > 0, room, 1)
        edge = np.where(taken > 0, self._losses, np.inf).min(axis=0)
        return mean, np.where(np.isfinite(edge), edge, 0.0)
