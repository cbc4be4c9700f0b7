"""What a user may choose about compression beside the profile and the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from hkvprof.errors import UsageError, refuse_unknown
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


def require_count(value: object, name: str, least: int, advice: str = "") -> None:
    """Raise UsageError unless `value` is a whole number of at least `least`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < least:  # type: ignore[call-overload]
        raise UsageError(
            f"{name} must be a whole number of at least {least}, found {value!r}{advice}"
        )


@dataclass(frozen=True)
class Options:
    """What `hkvprof.apply` lets one choose beside the profile and the budget.

    - `strict`: a covered layer that was not compressed, a foreign cache and a budget that does not
      fit a prompt raise; without, they stay dense with a reason on the receipt.
    - `min_tokens`: shorter prompts stay dense, and the receipt says so.
    - `compress_every`: generated tokens and later turns join the budget before they are more than
      5% over it, and after so many tokens at the latest (static heads are pruned again, full
      chunks of dynamic heads move to the host); 0 keeps them whole.
    - `host_dtype`: "int8" halves the host memory of dynamic heads; "same" is the model's dtype.
    - `smoothing` s in [0, 1) keeps a fetched token hot while s times its last score would: fewer
      transfers (docs/retrieval.md).
    - `prefetch` c in (0, 1], on CUDA only: selection and reads of host memory for the next step run
      beside this one, but for heads whose query has a cosine below c to its last (0.85;
      docs/gpu.md).
    - `monitor`: the share of requests (0.01) whose prompt is compared with the calibration's; the
      first one out of their domain warns (HkvWarning), all say so on their receipt
      (docs/method.md).

    Raises UsageError.
    """

    def __new__(cls, *_: Any, **given: Any) -> Options:
        """Raises UsageError for a name that is no option."""
        refuse_unknown("Options", given, cls.__dataclass_fields__, REMOVED)
        return super().__new__(cls)

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

    @classmethod
    def changed(cls, options: Options | None, changes: Mapping[str, Any]) -> Options:
        """`options`, or the defaults, with some fields changed by name. Raises UsageError."""
        refuse_unknown("apply", changes, cls.__dataclass_fields__, REMOVED)
        if options is not None and not isinstance(options, cls):
            raise UsageError(f"options must be hkvprof.Options, found {options!r}")
        return replace(options or cls(), **changes)

    @property
    def int8_host(self) -> bool:
        """Whether host items have 8 bits."""
        return self.host_dtype == "int8"

    @property
    def slot_bytes(self) -> int:
        """Device bytes per hot item beside its K/V: its number, with smoothing also its score."""
        return SLOT_BYTES + (SCORE_BYTES if self.smoothing else 0)
