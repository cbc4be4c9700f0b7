"""A benchmark's result with fixed figures, as if it had run."""

from __future__ import annotations

from dataclasses import replace

from hkvprof.bench.methods import Kind, Method
from hkvprof.bench.records import BenchResult, Context, Crossover, Regime, Row

MIB = 2**20
BUDGETS = ("0.2", "0.1", "0.05")


def make_result(contexts: tuple[int, ...] = (1024, 2048, 4096, 8192)) -> BenchResult:
    """Five kinds of rows; `static only, 0.05` never ran, `dynamic only, 0.1` not at 1,024."""
    regime = Regime(
        model="a <model> & more",
        profile="p.safetensors",
        layers=4,
        batch=1,
        steps=64,
        rounds=8,
        dtype="bfloat16",
        device="cpu (some)",
        threads=2,
        kernels="none",
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
    )
    made = tuple(_context(tokens) for tokens in contexts)
    crossovers = (Crossover("0.2", 2048, 3 * MIB), Crossover("0.1", None, None))
    return BenchResult(regime, made, crossovers)


def _context(tokens: int) -> Context:
    dense = tokens * 1024
    rows = [
        row(Method(Kind.DENSE), tokens, dense, 2 + tokens / 1024),
        row(Method(Kind.PREALLOCATED), tokens, dense + 65536, 1 + tokens / 1024),
    ]
    for budget in BUDGETS:
        for kind in (Kind.STATIC, Kind.DYNAMIC, Kind.PROFILE):
            method = Method(kind, budget)
            size = int(float(budget) * dense)
            if (kind, budget) == (Kind.STATIC, "0.05"):
                rows.append(Row(method.name, "static", budget, "too small"))
            elif (kind, budget, tokens) == (Kind.DYNAMIC, "0.1", 1024):
                rows.append(Row(method.name, "dynamic", budget, "too short"))
            else:
                rows.append(row(method, tokens, size, 3.0 + float(budget)))
    if tokens == 8192:  # one method after the other
        rows = [replace(row, group=number) for number, row in enumerate(rows)]
    return Context(tokens, 1, "prose", tuple(rows))


def row(method: Method, tokens: int, resident: int, step_ms: float) -> Row:
    """Figures that follow from a few numbers."""
    ours = method.kind.compresses
    return Row(
        method=method.name,
        kind=method.kind.name.lower(),
        budget=method.budget,
        resident_bytes=resident,
        dense_share=resident / (tokens * 1024),
        storage_bytes=resident,
        host_bytes=tokens * 512 if ours else 0,
        held_bytes=-4096,
        prefill_seconds=tokens / 1000,
        compression_seconds=tokens / 10000 if ours else None,
        compression_source="difference" if ours else "",
        steps=56,
        step_ms=step_ms,
        step_ms_p90=1.5 * step_ms,
        speedup_over_dense=(2 + tokens / 1024) / step_ms,
        speedup_over_preallocated=(1 + tokens / 1024) / step_ms,
        hit_rate=0.75 if ours else None,
    )
