"""What differs between two profiles of one model. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hkvprof.calibration.confidence import cohen_kappa, same_share, spearman
from hkvprof.errors import ProfileError
from hkvprof.heads import HeadType
from hkvprof.profile.record import Profile
from hkvprof.report.summary import percent

_SETTINGS = ("recipe", "default_budget", "keep", "strategies", "kappas")
_MOST_FLIPS = 20


@dataclass(frozen=True)
class Flip:
    """A head (`layer`, `head` from 0) whose type differs, and its shares of dense bytes."""

    layer: int
    head: int
    first: str
    second: str
    first_share: float
    second_share: float


@dataclass(frozen=True)
class Difference:
    """Second against first profile, both at their default budgets.

    `settings` are the names of what was asked of calibration and differs; `arrays` those of the
    tensors that differ. `agreement` is the share of heads of the same type, `kappa` Cohen's;
    `share_change` the mean and `largest_change` the largest absolute change of a head's share;
    `rank_correlation` Spearman's of the shares (both: calibration.confidence).
    """

    settings: tuple[str, ...]
    arrays: tuple[str, ...]
    flips: tuple[Flip, ...]
    agreement: float
    kappa: float
    share_change: float
    largest_change: float
    rank_correlation: float

    @property
    def is_same(self) -> bool:
        """Whether the runtime does the same with both at every budget; provenance may differ."""
        return not self.settings and not self.arrays

    def to_json(self) -> dict[str, Any]:
        """All that differs as a JSON-ready dict."""
        return {**asdict(self), "same": self.is_same}


def difference(first: Profile, second: Profile) -> Difference:
    """Compare two profiles. Raises ProfileError where they are of different models."""
    if mismatches := first.fingerprint.mismatches(second.fingerprint):
        raise ProfileError(
            "the profiles are of different models ("
            + "; ".join(mismatches[:4])
            + "): expected two "
            "profiles of one model"
        )
    types = first.head_types, second.head_types
    change = np.abs(first.budget.astype(np.float64) - second.budget)
    flips = tuple(
        Flip(
            int(layer), int(head), _kind(types[0][layer, head]), _kind(types[1][layer, head]),
            float(first.budget[layer, head]), float(second.budget[layer, head]),
        )
        for layer, head in np.argwhere(types[0] != types[1])
    )  # fmt: skip
    return Difference(
        settings=tuple(n for n in _SETTINGS if getattr(first, n) != getattr(second, n)),
        arrays=tuple(_differing(first, second)),
        flips=flips,
        agreement=same_share(types[0], types[1]),
        kappa=cohen_kappa(types[0], types[1]),
        share_change=float(change.mean()),
        largest_change=float(change.max()),
        rank_correlation=spearman(first.budget, second.budget),
    )


def lines(compared: Difference) -> list[str]:
    """The difference in words."""
    if compared.is_same:
        return ["The profiles are the same (apart from their provenance)."]
    told = [
        f"{percent(compared.agreement)} of heads have the same type (kappa {compared.kappa:.2f}); "
        f"{len(compared.flips)} flipped",
        f"shares change by {percent(compared.share_change)} of dense bytes on average, at most by "
        f"{percent(compared.largest_change)}, Spearman {compared.rank_correlation:.2f}",
    ]
    if compared.settings:
        told.insert(0, f"settings that differ: {', '.join(compared.settings)}")
    told.append(f"tensors that differ: {', '.join(compared.arrays) or 'none'}")
    told += [
        f"  layer {f.layer:3} head {f.head:2}  {f.first} -> {f.second}, "
        f"{percent(f.first_share)} -> {percent(f.second_share)}"
        for f in compared.flips[:_MOST_FLIPS]
    ]
    if len(compared.flips) > _MOST_FLIPS:
        told.append(f"  and {len(compared.flips) - _MOST_FLIPS} more (--json has all)")
    return told


def _kind(number: Any) -> str:
    return HeadType(int(number)).name.lower()


def _differing(first: Profile, second: Profile) -> Iterator[str]:
    old, new = first.tensors(), second.tensors()
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or not np.array_equal(old[name], new[name]):
            yield name
