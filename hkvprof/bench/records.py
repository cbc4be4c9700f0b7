"""What a benchmark found: plain numbers, from which tables, plots and JSON are made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hkvprof.errors import UsageError
from hkvprof.files.atomic import write_atomically

FORMAT = 2
FILLED = (
    "no prompt was read: keys of falling spectrum (the i-th standard deviation is i^-0.75) in a "
    "random basis, runs of 64 tokens share half of their variance; values are noise; every step is "
    "a real pass over tokens whose embeddings drift"
)
_PCIE_5 = 40.0
"""GB/s from the host from which on a link counts as PCIe 5 x16 (63 GB/s each way by its standard,
PCIe 4 has 31.5)."""


@dataclass(frozen=True)
class Row:
    """One method at one context and batch. None: not applicable, or nobody tells.

    `reason` says why there are no figures. `graph`: steps are replayed as a CUDA graph; `control`:
    host items lie on the device, to show what the host link costs. `group` numbers the sets of
    caches that were alive together and took turns.

    Bytes are those after the prompt, before the first new token, without `table_bytes` (index
    tables, once per model): `resident_bytes` by the cache's own account, `storage_bytes` by its
    tensors, `held_bytes` by the device's allocator (CPU: by how much the process grew; caches
    filled by hand: by tensors). `dense_share` and `held_share` are resident and held bytes over
    those of a dense cache. `peak_bytes` is the most K/V during prefill, `read_bytes` what attention
    reads in a step, `moved_bytes` what a step moves from the host, which over
    dense bytes is `read_share`, and at most `limit_share`.

    `step_ms` is the median over `steps` timed steps, `attend_ms` attention of all layers alone.
    `compression_seconds` is the runtime's own figure or, where `compression_source` says
    `difference`, prefill less the dense prefill. A speed-up is the other cache's `step_ms` over
    this one's: above 1 means that this one is faster; `best` is the fastest dense cache. `ceiling`
    is the speed-up if a step took as long as reading weights and K/V; `bandwidth_share` is
    attention's bandwidth over the copy bandwidth, `bound_share` reading weights and K/V at that
    bandwidth over `step_ms`, `link_ms` what `moved_bytes` take at the host link's bandwidth,
    `exposed_share` the share of a step that is gone in the control.
    """

    method: str
    kind: str
    budget: str = ""
    reason: str = ""
    graph: bool = False
    control: bool = False
    group: int = 0
    resident_bytes: int | None = None
    dense_share: float | None = None
    storage_bytes: int | None = None
    held_bytes: int | None = None
    held_share: float | None = None
    host_bytes: int | None = None
    table_bytes: int | None = None
    peak_bytes: int | None = None
    read_bytes: int | None = None
    prefill_seconds: float | None = None
    compression_seconds: float | None = None
    compression_source: str = ""
    steps: int = 0
    step_ms: float | None = None
    step_ms_p90: float | None = None
    attend_ms: float | None = None
    speedup_over_dense: float | None = None
    speedup_over_preallocated: float | None = None
    speedup_over_best: float | None = None
    ceiling: float | None = None
    ceiling_share: float | None = None
    bandwidth_share: float | None = None
    bound_share: float | None = None
    retrieval_share: float | None = None
    hit_rate: float | None = None
    moved_bytes: float | None = None
    read_share: float | None = None
    limit_share: float | None = None
    link_ms: float | None = None
    corrected_share: float | None = None
    exposed_share: float | None = None


@dataclass(frozen=True)
class Context:
    """All methods at one prompt length in tokens and one batch (rows of equal length).

    `prompt` says what it is made of, `seconds` how long everything here took.
    """

    tokens: int
    batch: int
    prompt: str
    rows: tuple[Row, ...]
    seconds: float = 0.0

    @property
    def ran(self) -> tuple[Row, ...]:
        """The rows that have figures."""
        return tuple(row for row in self.rows if not row.reason)

    @property
    def groups(self) -> int:
        """Sets of caches that took turns; 1: all were alive at once, their steps interleaved."""
        return len({row.group for row in self.ran})

    def row(self, method: str) -> Row | None:
        """The figures of one method, None if it did not run."""
        return next((row for row in self.ran if row.method == method), None)


@dataclass(frozen=True)
class Regime:
    """Under which conditions the figures hold. Two runs may share a file if these, but for
    `kernels`, are equal.

    `steps` are decoding steps of every method in `rounds` turns. The rest is told where caches are
    filled by hand: `weight_bytes` are those a step reads, `token_bytes` those of a token's dense
    K/V in all layers, `drift` the correlation of a step's embedding with the last one's; `batch`
    is None there, because contexts have several.
    """

    model: str
    profile: str
    layers: int
    batch: int | None
    steps: int
    rounds: int
    dtype: str
    device: str
    threads: int
    kernels: str
    versions: dict[str, str]
    budgets: tuple[str, ...] = ()
    prefill_tokens: int | None = None
    drift: float | None = None
    weight_bytes: int | None = None
    token_bytes: int | None = None

    @property
    def filled(self) -> bool:
        """Whether caches were filled by hand."""
        return self.drift is not None

    def __str__(self) -> str:
        batch = "" if self.batch is None else f"batch {self.batch}, "
        steps = f"{batch}{self.steps} forced tokens in {self.rounds} rounds"
        if self.weight_bytes is not None:
            steps = (
                f"random weights ({self.weight_bytes / 1e9:.2f} GB read per step), "
                f"{self.token_bytes:,} bytes of K/V per token, median of {self.steps} steps in "
                f"{self.rounds} rounds, methods in turn"
            )
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.model} ({self.layers} layers), profile {self.profile}, {steps}, {self.dtype} "
            f"on {self.device}, {self.threads} threads, kernels: {self.kernels}; {versions}"
        )


@dataclass(frozen=True)
class Links:
    """GB/s (1e9 bytes). `copy` counts bytes read and written; the others each byte once."""

    copy: float
    from_host: float
    to_host: float
    megabytes: float

    @property
    def is_pcie_5(self) -> bool:
        """Whether the host link is at least that fast."""
        return self.from_host >= _PCIE_5


@dataclass(frozen=True)
class PrefillTime:
    """Seconds to the first token at one context, batch 1."""

    tokens: int
    method: str
    seconds: float
    dense_seconds: float

    @property
    def overhead_share(self) -> float:
        """What compression adds, of the method's own time to the first token.

        May be below 0 where noise is larger than the difference.
        """
        return 1 - self.dense_seconds / self.seconds


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
    """A whole benchmark, or the part of it that is done; contexts in the order of their sizes.

    Where caches are filled by hand there are `links`, `prefill` times, and `wanted`: the pairs of
    context and batch that were asked for.
    """

    regime: Regime
    contexts: tuple[Context, ...] = ()
    crossovers: tuple[Crossover, ...] = ()
    links: Links | None = None
    prefill: tuple[PrefillTime, ...] = ()
    wanted: tuple[tuple[int, int], ...] = ()
    no_prefill: str = ""
    """Why there are no prefill times."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Names in the order of rows."""
        names = (row.method for context in self.contexts for row in context.rows)
        return tuple(dict.fromkeys(names))

    @property
    def left(self) -> tuple[tuple[int, int], ...]:
        """What was asked for and not run yet."""
        done = {(context.tokens, context.batch) for context in self.contexts}
        return tuple(pair for pair in self.wanted if pair not in done)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, ready for json.dumps."""
        head: dict[str, Any] = {"format": FORMAT, "complete": not self.left}
        if self.regime.filled:
            head["filled_with"] = FILLED
        data = asdict(self)
        for made, one in zip(data["prefill"], self.prefill, strict=True):
            made["overhead_share"] = one.overhead_share
        return {**head, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BenchResult:
        """The inverse. Raises KeyError, TypeError or ValueError on other data."""
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, expected {FORMAT}")
        stored = {field.name for field in fields(PrefillTime)}
        links, budgets = data["links"], tuple(data["regime"]["budgets"])
        return cls(
            regime=Regime(**{**data["regime"], "budgets": budgets}),
            contexts=tuple(
                Context(**{**context, "rows": tuple(Row(**row) for row in context["rows"])})
                for context in data["contexts"]
            ),
            crossovers=tuple(Crossover(**one) for one in data["crossovers"]),
            links=None if links is None else Links(**links),
            prefill=tuple(
                PrefillTime(**{key: one[key] for key in stored}) for one in data["prefill"]
            ),
            wanted=tuple((int(tokens), int(batch)) for tokens, batch in data["wanted"]),
            no_prefill=data.get("no_prefill", ""),
        )

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all. Raises HkvError."""
        write_atomically(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())


def resume(path: Path, regime: Regime) -> BenchResult | None:
    """What an earlier run left in `path`; None if there is no such file.

    Raises UsageError for a file that holds no benchmark or was made under another regime.
    """
    if not path.exists():
        return None
    try:
        earlier = BenchResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is no benchmark of a GPU to go on with ({error}): give another --json, or "
            "remove it"
        ) from error
    old, new = asdict(earlier.regime), asdict(regime)
    del new["kernels"]  # says what is compiled already; that Triton is used is checked elsewhere
    other = [f"{name} {old[name]} there, {new[name]} now" for name in new if old[name] != new[name]]
    if other:
        raise UsageError(
            f"{path} holds figures of another benchmark ({'; '.join(other)}): give another --json, "
            "or remove it"
        )
    return earlier
