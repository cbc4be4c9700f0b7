"""What the GPU benchmark found: plain numbers, and the file that holds them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hkvprof.bench.gpu.links import Links
from hkvprof.bench.gpu.machine import CPU
from hkvprof.errors import UsageError
from hkvprof.files.atomic import write_atomically

FORMAT = 1
FILLED = (
    "no prompt was read: keys of falling spectrum (the i-th standard deviation is i^-0.75) in a "
    "random basis, runs of 64 tokens share half of their variance; values are noise; every step is "
    "a real pass over tokens whose embeddings drift"
)


@dataclass(frozen=True)
class Regime:
    """Under which conditions the figures hold. Two runs may share a file if these are equal.

    `weight_bytes` are those a step reads, `token_bytes` those of a token's dense K/V in all layers.
    """

    shape: str
    layers: int
    dtype: str
    budgets: tuple[str, ...]
    steps: int
    rounds: int
    prefill_tokens: int
    drift: float
    weight_bytes: int
    token_bytes: int
    device: str
    versions: dict[str, str]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.shape}, layers: {self.layers}, {self.dtype}, random weights "
            f"({self.weight_bytes / 1e9:.2f} GB read per step), {self.token_bytes:,} bytes of K/V "
            f"per token, on {self.device}; median of {self.steps} steps in {self.rounds} rounds, "
            f"methods in turn; {versions}"
        )


@dataclass(frozen=True)
class Row:
    """One method in one cell; `reason` says why there are no figures. None: not applicable.

    A `control` has its host items on the device: nothing to choose, but what the link costs.

    `mode`: `eager` (transformers' forward as it is) or `graph` (the same as a CUDA graph). `group`
    numbers the sets of caches that were alive together and took turns. Bytes are those after the
    prompt: `resident_bytes` by the cache's own account, `held_bytes` by the allocator (on a CPU by
    its tensors), both without the `table_bytes` of indexes, which a model needs once; `read_bytes`
    is what attention reads in a step. `attend_ms` is attention of all
    layers alone. Shares are of 1; `bandwidth_share` is of the copy bandwidth, `link_ms` is what
    `moved_bytes` take at the host link's bandwidth, `exposed_share` is of a step.
    """

    method: str
    types: str
    budget: str
    mode: str
    reason: str = ""
    control: bool = False
    group: int = 0
    resident_bytes: int | None = None
    held_bytes: int | None = None
    held_share: float | None = None
    host_bytes: int | None = None
    table_bytes: int | None = None
    read_bytes: int | None = None
    step_ms: float | None = None
    step_ms_p90: float | None = None
    attend_ms: float | None = None
    bandwidth_share: float | None = None
    bound_share: float | None = None
    over_dynamic_cache: float | None = None
    over_best_dense: float | None = None
    ceiling: float | None = None
    ceiling_share: float | None = None
    hit_rate: float | None = None
    moved_bytes: float | None = None
    link_ms: float | None = None
    corrected_share: float | None = None
    exposed_share: float | None = None


@dataclass(frozen=True)
class Cell:
    """All methods at one context (tokens) and batch (rows of equal length)."""

    context: int
    batch: int
    rows: tuple[Row, ...]
    seconds: float = 0.0

    def row(self, method: str) -> Row | None:
        """The figures of one method, None if it did not run."""
        return next((row for row in self.rows if row.method == method and not row.reason), None)


@dataclass(frozen=True)
class Prefill:
    """Seconds to the first token at one context, batch 1; `overhead_share` is what compression
    adds, of the method's own time to the first token."""

    tokens: int
    method: str
    seconds: float
    dense_seconds: float

    @property
    def overhead_share(self) -> float:
        """May be below 0 where noise is larger than the difference."""
        return 1 - self.dense_seconds / self.seconds


@dataclass(frozen=True)
class Result:
    """A whole benchmark, or the part of it that is done; `wanted` are (context, batch) pairs."""

    regime: Regime
    wanted: tuple[tuple[int, int], ...]
    links: Links
    prefill: tuple[Prefill, ...] = ()
    cells: tuple[Cell, ...] = field(default=())

    @property
    def on_gpu(self) -> bool:
        """Whether times mean anything."""
        return not self.regime.device.startswith(CPU)

    @property
    def left(self) -> tuple[tuple[int, int], ...]:
        """Cells that were not run yet."""
        done = {(cell.context, cell.batch) for cell in self.cells}
        return tuple(pair for pair in self.wanted if pair not in done)

    def rows(self) -> list[tuple[Cell, Row]]:
        """All rows with figures."""
        return [(cell, row) for cell in self.cells for row in cell.rows if not row.reason]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        data = asdict(self)
        for made, one in zip(data["prefill"], self.prefill, strict=True):
            made["overhead_share"] = one.overhead_share
        head = {"format": FORMAT, "complete": not self.left, "filled_with": FILLED}
        return {**head, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The inverse. Raises KeyError, TypeError or ValueError on other data."""
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
        regime = dict(data["regime"])
        regime["budgets"] = tuple(regime["budgets"])
        known = {one.name for one in fields(Prefill)}
        return cls(
            Regime(**regime),
            tuple((int(context), int(batch)) for context, batch in data["wanted"]),
            Links(**data["links"]),
            tuple(Prefill(**{k: v for k, v in p.items() if k in known}) for p in data["prefill"]),
            tuple(
                Cell(**{**cell, "rows": tuple(Row(**row) for row in cell["rows"])})
                for cell in data["cells"]
            ),
        )


def save(result: Result, path: Path) -> None:
    """Write, whole or not at all."""
    write_atomically(path, (json.dumps(result.to_json(), indent=1) + "\n").encode())


def resume(path: Path, regime: Regime) -> Result | None:
    """What an earlier run left in `path`; None if there is no such file.

    Raises UsageError for a file that is none of ours or was made under another regime.
    """
    if not path.exists():
        return None
    try:
        found = Result.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is no benchmark of a GPU to go on with ({error}): give another --json, or "
            "remove it"
        ) from error
    old, new = asdict(found.regime), asdict(regime)
    other = [f"{name} {old[name]} there, {new[name]} now" for name in new if old[name] != new[name]]
    if other:
        raise UsageError(
            f"{path} holds figures of another benchmark ({'; '.join(other)}): give another --json, "
            "or remove it"
        )
    return found
