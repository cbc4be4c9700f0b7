"""What a user may choose about compression beside the profile and the budget."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real

from hkvprof.errors import UsageError
from hkvprof.profile.costs import SCORE_BYTES, SLOT_BYTES

MIN_TOKENS = 256
"""Shorter prompts decode no faster compressed (`hkvprof bench --crossover`; README)."""
COMPRESS_EVERY = 128
SMOOTHING = 0.5
"""A third fewer transfers at the same quality (docs/retrieval.md)."""
HOST_DTYPES = ("same", "int8")
PREFETCH = 0.85
"""Within FreeKV's range for its correction (arXiv 2505.13109)."""


REMOVED = {
    "decode_compression": (
        "compress_every=0 keeps generated tokens whole; without it they join the budget"
    ),
    "retrieve_every": "dynamic heads select at every step; leave it out",
}
"""Options of earlier versions, and what to do instead."""


def refuse_unknown(given: Collection[str]) -> None:
    """Raise UsageError where `given` names an option."""
    for name in given:
        advice = REMOVED.get(name, "see help(hkvprof.runtime.apply) for those there are")
        raise UsageError(f"apply has no option {name!r}: {advice}")


def require_count(value: object, name: str, least: int, advice: str = "") -> None:
    """Raise UsageError unless `value` is a whole number of at least `least`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < least:  # type: ignore[call-overload]
        raise UsageError(
            f"{name} must be a whole number of at least {least}, found {value!r}{advice}"
        )


@dataclass(frozen=True)
class Options:
    """Choices of `hkvprof.runtime.apply`; see there.

    `compress_every` 0 means that generated tokens are kept whole. Raises UsageError.
    """

    strict: bool = True
    min_tokens: int = MIN_TOKENS
    compress_every: int = COMPRESS_EVERY
    host_dtype: str = "same"
    smoothing: float = SMOOTHING
    prefetch: float | None = None
    monitor: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.strict, bool):
            raise UsageError(f"strict must be True or False, found {self.strict!r}")
        require_count(self.min_tokens, "min_tokens", 1)
        require_count(
            self.compress_every, "compress_every", 0,
            " (0 keeps generated tokens whole)",
        )  # fmt: skip
        for name in ("smoothing", "monitor", "prefetch"):
            value = getattr(self, name)
            absent = name == "prefetch" and value is None
            if not absent and (isinstance(value, bool) or not isinstance(value, Real)):
                raise UsageError(f"{name} must be a number, found {value!r}")
        if self.host_dtype not in HOST_DTYPES:
            raise UsageError(
                f"host_dtype must be one of {', '.join(HOST_DTYPES)}, found {self.host_dtype!r}"
            )
        if not 0 <= self.smoothing < 1:
            raise UsageError(f"smoothing must be in [0, 1), found {self.smoothing}")
        if not 0 <= self.monitor <= 1:
            raise UsageError(f"monitor is a share of requests in [0, 1], found {self.monitor}")
        if self.prefetch is not None and not 0 < self.prefetch <= 1:
            raise UsageError(
                f"prefetch must be a cosine in (0, 1] such as {PREFETCH}, found {self.prefetch}"
            )

    @property
    def slot_bytes(self) -> int:
        """Device bytes per hot item beside its K/V: its number, with smoothing also its score."""
        return SLOT_BYTES + (SCORE_BYTES if self.smoothing else 0)
