"""Whether a prompt is like those of the calibration: the drift sentinel's arithmetic (numpy only).

A prompt's figure is the largest deviation of any query head's text-centric sparsity from the mean
of the calibration's samples, in standard deviations. What is usual is read off the samples
themselves: each against all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.profile.bounds import ProvenanceReader

KEY = "domain"
"""Where the record stands in a profile's provenance."""
_READ = ProvenanceReader(KEY, "calibrate or merge")
LEAST_SAMPLES = 10
FALSE_ALARMS = 0.01
"""Share of prompts of the calibrated kind that may be called out of domain."""
FLOOR = 0.02
"""Least standard deviation: a change of sparsity by less is within rounding and chance."""


@dataclass(frozen=True)
class DomainCheck:
    """What the monitor found in one request: the query head that moved most.

    `layer` is the decoder layer's number, `kappa` the share of visible keys that sparsity counts,
    `expected` the calibration's mean; `deviations` are in standard deviations, out of domain above
    `bound`. Nothing is compared with a `reason`.
    """

    layer: int = -1
    query_head: int = -1
    kappa: float = 0.0
    expected: float = 0.0
    found: float = 0.0
    deviations: float = 0.0
    bound: float = 0.0
    out_of_domain: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Domain:
    """What is usual: prompts like the `samples` of the calibration exceed `bound` (in standard
    deviations, of the query head that deviates most) at the rate `false_alarms`. With a `reason`
    there is no bound."""

    samples: int
    bound: float = 0.0
    false_alarms: float = 0.0
    reason: str = ""

    @classmethod
    def of(cls, sparsity: NDArray[np.float64], has_context: bool) -> Domain:
        """What is usual by the samples' sparsity [samples, ...].

        `has_context`: some of the samples mark text as context, and there is no bound.

        Each sample's figure is taken against all others. That of a new prompt of their kind is as
        likely to have any rank among them, whatever their distribution (conformal prediction; here
        nearly so, since it is compared with one sample more): it exceeds the r-th smallest of n
        with probability (n + 1 - r) / (n + 1).
        """
        count = len(sparsity)
        if has_context:
            return cls(count, reason="samples mark long text as context, which prompts do not")
        if count < LEAST_SAMPLES:
            return cls(count, reason=f"{count} samples are fewer than {LEAST_SAMPLES}")
        flat = sparsity.reshape(count, -1).astype(np.float64)
        others = _others(flat)
        figures = deviations(flat, *others, count - 1).max(axis=1)
        rank = min(count, math.ceil((count + 1) * (1 - FALSE_ALARMS)))
        bound = float(np.sort(figures)[rank - 1])
        return cls(count, math.ceil(bound * 100) / 100, round((count + 1 - rank) / (count + 1), 4))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the inverse of `from_json`."""
        plain = asdict(self)
        return {k: plain[k] for k in ("samples", "reason")} if self.reason else plain

    @classmethod
    def from_json(cls, data: Any) -> Domain:
        """Build from a stranger's JSON, checked. Raises ProfileError."""
        known = {"samples": int, "bound": float, "false_alarms": float, "reason": str}
        if (
            not isinstance(data, Mapping)
            or not {"samples", "reason"} <= data.keys() <= known.keys()
        ):
            raise _READ.wrong(KEY, "an object of samples, bound, false_alarms, reason", data)
        for name, value in data.items():
            if type(value) is not known[name]:
                raise _READ.wrong(name, f"a value of type {known[name].__name__}", value)
        found = cls(**data)
        if found.samples < 1 or not 0 <= found.bound < 1e6 or not 0 <= found.false_alarms <= 1:
            raise _READ.wrong(KEY, "samples above 0, a finite bound, a rate", data)
        return found


def _others(flat: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of all rows but one, for every row."""
    rest = len(flat) - 1
    mean = flat.mean(axis=0)
    centred = flat - mean
    square = ((centred**2).sum(axis=0) - centred**2) / rest - (centred / rest) ** 2
    return mean - centred / rest, np.sqrt(np.maximum(square, 0))


def deviations(
    found: NDArray[np.float64],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    samples: int,
) -> NDArray[np.float64]:
    """|found - mean| in standard deviations of a new sample's distance from the mean of `samples`.

    `std` is the samples', with their number (not one less) as the divisor; at least FLOOR counts.
    """
    spread = np.maximum(std * math.sqrt(samples / (samples - 1)), FLOOR)
    return np.abs(found - mean) / (spread * math.sqrt(1 + 1 / samples))
