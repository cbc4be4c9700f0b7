"""Made-up figures of a benchmark, simple enough to check by hand."""

from __future__ import annotations

from typing import Any

from hkvprof.bench.gpu.cells import compare
from hkvprof.bench.gpu.entrants import Method, methods
from hkvprof.bench.gpu.links import Links
from hkvprof.bench.gpu.records import Cell, Prefill, Regime, Result, Row

LINKS = Links(copy=1000.0, from_host=50.0, to_host=40.0, megabytes=1.0)
REGIME = Regime(
    shape="qwen2.5-vl-7b", layers=28, dtype="bfloat16", budgets=("0.20", "0.10", "0.05"), steps=32,
    rounds=4, prefill_tokens=32768, drift=0.95, weight_bytes=10_000_000_000, token_bytes=100_000,
    device="a card", versions={"torch": "2"},
)  # fmt: skip
MS: dict[str, float] = {
    "DynamicCache, eager": 40.0,
    "preallocated, graph": 20.0,
    "static 0.10, graph": 12.5,
    "hybrid 0.10, graph": 13.0,
    "hybrid 0.10, eager": 30.0,
    "hybrid 0.10, graph, items on the device": 12.48,
}
"""Milliseconds per step; other methods did not run."""


def row(method: Method, dense: int, times: dict[str, float] = MS) -> Row:
    """A row as it comes from its measurement, before it is compared."""
    if method.name not in times:
        return Row(method.name, method.types, method.budget, method.mode, "made up")
    share = float(method.budget or 1)
    held = int(share * dense)
    more: dict[str, Any] = {}
    if method.types == "hybrid":
        more = {"hit_rate": 0.9, "moved_bytes": 5_000_000.0, "host_bytes": dense // 2}
    return Row(
        method.name, method.types, method.budget, method.mode, control=method.control,
        resident_bytes=held, held_bytes=None if method.control else held, read_bytes=held,
        step_ms=times[method.name], step_ms_p90=50.0,
        attend_ms=2.0, **more,
    )  # fmt: skip


def cell(context: int = 32768, batch: int = 8, times: dict[str, float] = MS) -> Cell:
    """Compared rows; a dense cache has 10 GB, as many as the weights, whatever the context."""
    dense = 10_000_000_000
    rows = [row(method, dense, times) for method in methods(REGIME.budgets)]
    return Cell(context, batch, compare(rows, dense, REGIME, LINKS), 1.0)


def result(*cells: Cell, **changes: Any) -> Result:
    """A benchmark of these cells."""
    wanted = tuple((one.context, one.batch) for one in cells)
    prefill = (Prefill(32768, "hybrid 0.10", 2.0, 1.98),)
    return Result(**{"regime": REGIME, "wanted": wanted, "links": LINKS, "prefill": prefill,
                     "cells": cells, **changes})  # fmt: skip
