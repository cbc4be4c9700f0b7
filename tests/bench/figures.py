"""Made-up figures of a benchmark, simple enough to check by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hkvprof.bench.compare import compare
from hkvprof.bench.methods import Kind, Method, filled_methods
from hkvprof.bench.records import BenchResult, Context, Links, PrefillTime, Regime, Row

LINKS = Links(copy=1000.0, from_host=50.0, to_host=40.0, megabytes=1.0)
REGIME = Regime(
    model="qwen2.5-vl-7b", profile="uniform", layers=28, batch=None, dtype="bfloat16",
    budgets=("0.20", "0.10", "0.05"), steps=32, rounds=4, prefill_tokens=32768, drift=0.95,
    weight_bytes=10_000_000_000, token_bytes=100_000,
    device="cuda:0 (a card)", threads=8, kernels="triton", versions={"torch": "2"},
)  # fmt: skip
MS: dict[str, float] = {
    "dense": 40.0,
    "dense, preallocated, graph": 20.0,
    "static only, 0.10, graph": 12.5,
    "profile, 0.10, graph": 13.0,
    "profile, 0.10": 30.0,
    "profile, 0.10, graph, items on the device": 12.48,
}
"""Milliseconds per step; other methods did not run."""


def row(method: Method, dense: int, times: dict[str, float] = MS) -> Row:
    """A row as it comes from its measurement, before it is compared."""
    if method.name not in times:
        return method.row("made up")
    share = float(method.budget or 1)
    held = int(share * dense)
    more: dict[str, Any] = {}
    if method.kind is Kind.PROFILE:
        more = {"hit_rate": 0.9, "moved_bytes": 5_000_000.0, "host_bytes": dense // 2}
    kept = {} if method.control else {"held_bytes": held, "held_share": held / dense}
    return replace(
        method.row(), resident_bytes=held, read_bytes=held, **kept,
        step_ms=times[method.name], step_ms_p90=50.0,
        attend_ms=2.0, **more,
    )  # fmt: skip


def context(tokens: int = 32768, batch: int = 8, times: dict[str, float] = MS) -> Context:
    """Compared rows; a dense cache has 10 GB, as many as the weights, whatever the context."""
    dense = 10_000_000_000
    rows = [row(method, dense, times) for method in filled_methods(REGIME.budgets)]
    return Context(tokens, batch, "filled by hand", compare(rows, LINKS, dense, dense), 1.0)


def result(*contexts: Context, **changes: Any) -> BenchResult:
    """A benchmark of these contexts."""
    wanted = tuple((one.tokens, one.batch) for one in contexts)
    prefill = (PrefillTime(32768, "profile, 0.10", 2.0, 1.98),)
    return BenchResult(**{"regime": REGIME, "wanted": wanted, "links": LINKS, "prefill": prefill,
                     "contexts": contexts, **changes})  # fmt: skip
