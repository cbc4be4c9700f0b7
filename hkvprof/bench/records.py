"""What a benchmark found: plain numbers, from which tables, plots and JSON are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Bytes of a cache on the device by account and by its tensors, on the host, and dense."""

    resident: int
    storage: int
    host: int
    dense: int


@dataclass(frozen=True)
class Row:
    """One method at one context. Bytes are those after the prompt, before the first new token.

    `reason` says why there are no figures. `process_bytes` is how much the process (on CUDA: its
    device memory) grew by holding the cache; `peak_bytes` the most K/V bytes during prefill.
    `step_ms` is the median over `steps` decoding steps, `speedup` is another method's median over
    this one's: above 1 means that this one is faster. `compression_seconds` is the runtime's own
    figure or, where `compression_source` says `difference`, prefill less the dense prefill.
    None: not applicable, or nobody tells.
    """

    method: str
    kind: str
    budget: str = ""
    reason: str = ""
    resident_bytes: int | None = None
    dense_share: float | None = None
    storage_bytes: int | None = None
    host_bytes: int | None = None
    process_bytes: int | None = None
    peak_bytes: int | None = None
    prefill_seconds: float | None = None
    compression_seconds: float | None = None
    compression_source: str = ""
    steps: int = 0
    step_ms: float | None = None
    step_ms_p90: float | None = None
    speedup_over_dense: float | None = None
    speedup_over_preallocated: float | None = None
    retrieval_share: float | None = None
    hit_rate: float | None = None
    moved_bytes_per_step: float | None = None


@dataclass(frozen=True)
class Context:
    """All methods at one prompt length in tokens.

    `together`: all caches were alive at once and their steps interleaved; else memory did not allow
    it and the methods ran one after the other.
    """

    tokens: int
    prompt: str
    together: bool
    rows: tuple[Row, ...]

    def row(self, method: str) -> Row | None:
        """The figures of one method, None if it did not run."""
        return next((row for row in self.rows if row.method == method and not row.reason), None)


@dataclass(frozen=True)
class Regime:
    """Under which conditions the figures hold."""

    model: str
    profile: str
    layers: int
    batch: int
    new_tokens: int
    rounds: int
    dtype: str
    device: str
    threads: int
    kernels: str
    versions: dict[str, str]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.model} ({self.layers} layers), profile {self.profile}, batch {self.batch}, "
            f"{self.new_tokens} forced tokens in {self.rounds} rounds, {self.dtype} on "
            f"{self.device}, {self.threads} threads, kernels: {self.kernels}; {versions}"
        )


@dataclass(frozen=True)
class Crossover:
    """The shortest context from which on a budget is not slower than dense, and saves bytes.

    `tokens` None: at no measured context. `saved_bytes` are those at `tokens`.
    """

    budget: str
    tokens: int | None
    saved_bytes: int | None


@dataclass(frozen=True)
class BenchResult:
    """A whole benchmark; contexts ascend."""

    regime: Regime
    contexts: tuple[Context, ...]
    crossovers: tuple[Crossover, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names in the order of rows."""
        names = (row.method for context in self.contexts for row in context.rows)
        return tuple(dict.fromkeys(names))
