"""What a user may choose about compression beside the profile and the budget."""

from __future__ import annotations

from dataclasses import dataclass

from hkvprof.errors import UsageError
from hkvprof.policy.costs import SCORE_BYTES, SLOT_BYTES

MIN_TOKENS = 256
"""Shorter prompts decode no faster compressed (`hkvprof bench --crossover`; README)."""
COMPRESS_EVERY = 128
SMOOTHING = 0.5
"""A third fewer transfers at the same quality (docs/retrieval.md)."""
HOST_DTYPES = ("same", "int8")
PREFETCH = 0.85
"""Within FreeKV's range for its correction (arXiv 2505.13109)."""


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
    retrieve_every: int = 1
    prefetch: float | None = None
    monitor: float = 0.0

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise UsageError(f"min_tokens must be at least 1, found {self.min_tokens}")
        if self.compress_every < 0:
            raise UsageError(
                f"compress_every must be at least 1 token, found {self.compress_every}; to keep "
                "generated tokens whole use decode_compression=False"
            )
        if self.host_dtype not in HOST_DTYPES:
            raise UsageError(
                f"host_dtype must be one of {', '.join(HOST_DTYPES)}, found {self.host_dtype!r}"
            )
        if not 0 <= self.smoothing < 1:
            raise UsageError(f"smoothing must be in [0, 1), found {self.smoothing}")
        if self.retrieve_every < 1:
            raise UsageError(f"retrieve_every must be at least 1, found {self.retrieve_every}")
        if not 0 <= self.monitor <= 1:
            raise UsageError(f"monitor is a share of requests in [0, 1], found {self.monitor}")
        if self.prefetch is None:
            return
        if not 0 < self.prefetch <= 1:
            raise UsageError(
                f"prefetch must be a cosine in (0, 1] such as {PREFETCH}, found {self.prefetch}"
            )
        if self.retrieve_every > 1:
            raise UsageError(
                "prefetch selects at every step: give prefetch or retrieve_every, not both"
            )

    @property
    def slot_bytes(self) -> int:
        """Device bytes per hot item beside its K/V: its number, with smoothing also its score."""
        return SLOT_BYTES + (SCORE_BYTES if self.smoothing else 0)
