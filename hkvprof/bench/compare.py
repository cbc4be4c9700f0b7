"""What rows say side by side: ratios, from which context on compression pays, and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from hkvprof.bench.methods import Kind, Method
from hkvprof.bench.records import BenchResult, Context, Crossover, Links, Row

SHORTEST, LONGEST = 64, 4096
"""Contexts that are tried for a crossover, in tokens."""
TARGET_CONTEXT = 32768
SHARE_TOLERANCE = 0.02
"""By how much of itself a budget may be exceeded by the allocator's count: blocks of 512 bytes."""
NOT_MEASURED = "not measured"


def compare(
    rows: Sequence[Row],
    links: Links | None = None,
    weight_bytes: int = 0,
    dense_bytes: int = 0,
) -> tuple[Row, ...]:
    """The rows of a context with their ratios to each other.

    Of filled caches also what follows from the machine's `links` and from the bytes of weights that
    a step reads and of a dense cache.
    """
    others = [row for row in rows if row.step_ms is not None and not row.control]
    stock = next((row for row in others if row.kind == "dense"), None)
    plain = [row for row in others if row.kind in ("dense", "preallocated")]
    preallocated = next((row for row in plain if row.kind != "dense" and not row.graph), None)
    best = min(plain, key=_step_ms, default=None)
    compared = []
    for row in rows:
        if row.step_ms is not None and not row.control:
            row = replace(
                row,
                speedup_over_dense=_speedup(stock, row),
                speedup_over_preallocated=_speedup(preallocated, row),
                speedup_over_best=None if links is None else _speedup(best, row),
            )
        if stock is not None and stock.prefill_seconds is not None:
            row = _with_compression(row, stock.prefill_seconds)
        if links is not None and row.step_ms is not None:
            row = _against_links(row, rows, links, weight_bytes, dense_bytes)
        compared.append(row)
    return tuple(compared)


def _step_ms(row: Row) -> float:
    assert row.step_ms is not None
    return row.step_ms


def _speedup(other: Row | None, row: Row) -> float | None:
    return None if other is None else _step_ms(other) / _step_ms(row)


def _with_compression(row: Row, dense_seconds: float) -> Row:
    """Seconds of compression by difference where the runtime does not tell."""
    if not row.budget or row.compression_source or row.prefill_seconds is None:
        return row
    seconds = row.prefill_seconds - dense_seconds
    return replace(row, compression_seconds=seconds, compression_source="difference")


def _against_links(
    row: Row, rows: Sequence[Row], links: Links, weights: int, dense_bytes: int
) -> Row:
    """Shares of the ceiling and of bandwidths, and what crossing the host link costs."""
    step_ms = _step_ms(row)
    assert row.attend_ms is not None
    assert row.read_bytes is not None
    assert row.resident_bytes is not None
    ceiling = (weights + dense_bytes) / (weights + row.resident_bytes)
    best, same = row.speedup_over_best, (row.kind, row.budget, row.graph)
    controls = [one.step_ms for one in rows if one.control
                and (one.kind, one.budget, one.graph) == same]  # fmt: skip
    control = None if row.control or not controls else controls[0]
    return replace(
        row,
        ceiling=ceiling,
        ceiling_share=None if best is None else best / ceiling,
        bandwidth_share=row.read_bytes / row.attend_ms / 1e6 / links.copy,
        bound_share=(weights + row.read_bytes) / links.copy / 1e6 / step_ms,
        link_ms=None if row.moved_bytes is None else row.moved_bytes / links.from_host / 1e6,
        exposed_share=None if control is None else 1 - control / step_ms,
    )


def crossover_contexts(limit: int | None) -> tuple[int, ...]:
    """Prompt lengths in tokens, doubling, capped by the model's limit."""
    lengths = [SHORTEST]
    while lengths[-1] < LONGEST:
        lengths.append(2 * lengths[-1])
    return tuple(takewhile(lambda tokens: limit is None or tokens <= limit, lengths))


def find_crossovers(contexts: Sequence[Context], budgets: Sequence[str]) -> tuple[Crossover, ...]:
    """Per budget, the shortest context from which on `profile` is not slower and takes fewer bytes,
    there and at all longer contexts measured."""
    return tuple(_find_crossover(contexts, budget) for budget in budgets)


def _find_crossover(contexts: Sequence[Context], budget: str) -> Crossover:
    found = Crossover(budget, None, None)
    for context in reversed(contexts):
        saved = _saved(context, budget)
        if saved is None:
            break
        found = Crossover(budget, context.tokens, saved)
    return found


def _saved(context: Context, budget: str) -> int | None:
    """Bytes saved at a context; None where ours is slower, saves nothing or did not run."""
    ours = context.row(Method(Kind.PROFILE, budget).name)
    dense = context.row(Method(Kind.DENSE).name)
    if ours is None or dense is None:
        return None
    saved = (dense.resident_bytes or 0) - (ours.resident_bytes or 0)
    return saved if _step_ms(ours) <= _step_ms(dense) and saved > 0 else None


# -- targets of filled caches -------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """`verdict`: met, not met, not measured, or does not apply. `found` names the worst figure."""

    wanted: str
    verdict: str
    found: str


Figure = tuple[float, str]
"""A value, and the words that say it and where it was measured."""


def check_targets(result: BenchResult) -> list[Target]:
    """All of them; each is judged by the worst figure that it speaks of."""
    middle = result.regime.budgets[len(result.regime.budgets) // 2]
    rows = [(context, row) for context in result.contexts for row in context.ran]
    recorded = [(context, row) for context, row in rows if row.graph]
    here = [(context, row) for context, row in rows if context.tokens == TARGET_CONTEXT]
    names = [Method(Kind.PROFILE, middle, graph=graph).name for graph in (True, False)]
    at = f"{TARGET_CONTEXT:,} tokens"
    return [
        _judge(
            f"decode attention >= 80% of the copy bandwidth at {at} (whole, static)",
            _figures("bandwidth_share", [(context, row) for context, row in here
                                         if row.graph and row.kind in ("whole", "static")]),
            least=0.80,
        ),
        _judge(
            "a step >= 85% of the ceiling's speed-up at batch 8 and 32 (profile, over the best "
            "dense cache)",
            _figures("ceiling_share", [(context, row) for context, row in recorded
                                       if context.batch in (8, 32) and row.kind == "profile"]),
            least=0.85,
        ),
        *(
            _judge(
                f">= 1.8x over transformers' DynamicCache at {at}, batch 1 ({name})",
                _figures("speedup_over_dense", [(context, row) for context, row in here
                                                if context.batch == 1 and row.method == name]),
                least=1.8,
            )
            for name in names
        ),
        _against_static(result, middle),
        _judge(
            "exposed transfer <= 5% of a step (profile)",
            _figures("exposed_share", [(c, row) for c, row in rows if row.method == names[0]]),
            most=0.05,
        ),
        _judge(
            "compression <= 1.5% of the time to the first token (profile)",
            [(one.overhead_share, f"{one.overhead_share:.2%} at {one.tokens:,} tokens, batch 1")
             for one in result.prefill if one.method.startswith(Kind.PROFILE)],
            most=0.015,
        ),
        _judge(
            f"all-in share as promised, by the allocator (within {SHARE_TOLERANCE:.0%} of it)",
            [(row.held_share / float(row.budget), f"{row.held_share:.2%}{_where(context, row)}")
             for context, row in rows
             if row.held_share is not None and row.budget and row.kind != "whole"],
            most=1 + SHARE_TOLERANCE,
        ),
    ]  # fmt: skip


def _figures(field: str, rows: Sequence[tuple[Context, Row]]) -> list[Figure]:
    """One field of these rows where it is known: a share, or times another."""
    write = "{:.2f}x" if field.startswith("speedup") else "{:.1%}"
    values = [(getattr(row, field), _where(context, row)) for context, row in rows]
    return [(value, write.format(value) + where) for value, where in values if value is not None]


def _where(context: Context, row: Row) -> str:
    return f", {row.method} at {context.tokens:,} x {context.batch}"


def _judge(
    wanted: str, figures: Sequence[Figure], least: float | None = None, most: float = 0.0
) -> Target:
    """By the worst figure: the least where at least so much is wanted, else the greatest."""
    if not figures:
        return Target(wanted, NOT_MEASURED, "")
    worst = max if least is None else min
    value, text = worst(figures, key=lambda figure: figure[0])
    good = value <= most if least is None else value >= least
    text += f" (the worst of {len(figures)})" if len(figures) > 1 else ""
    return Target(wanted, "met" if good else "not met", text)


def _against_static(result: BenchResult, middle: str) -> Target:
    wanted = "profile <= 1.04x the latency of all-static where the host link is PCIe 5"
    assert result.links is not None
    if not result.links.is_pcie_5:
        link = f"the host link gives {result.links.from_host:.1f} GB/s"
        return Target(wanted, "does not apply", link)
    names = [Method(kind, middle, graph=True).name for kind in (Kind.PROFILE, Kind.STATIC)]
    figures = []
    for context in result.contexts:
        ours, static = map(context.row, names)
        if ours is not None and static is not None:
            ratio = _step_ms(ours) / _step_ms(static)
            figures.append((ratio, f"{ratio:.3f}x at {context.tokens:,} x {context.batch}"))
    return _judge(wanted, figures, most=1.04)
