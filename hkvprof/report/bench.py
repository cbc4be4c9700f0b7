"""A benchmark's tables: memory and time, one pair per context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from hkvprof.bench.records import BenchResult, Context, Crossover, Row

MIB = 2**20


@dataclass(frozen=True)
class Column:
    """A heading, where its figure stands in a row, and how it is written."""

    heading: str
    field: str
    write: Callable[[float], str]


def _mib(value: float) -> str:
    return f"{value / MIB:,.2f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _kib(value: float) -> str:
    return f"{value / 1024:,.1f}"


MEMORY = (
    Column("resident MiB", "resident_bytes", _mib),
    Column("share of dense", "dense_share", _percent),
    Column("by tensors MiB", "storage_bytes", _mib),
    Column("host MiB", "host_bytes", _mib),
    Column("process grew MiB", "process_bytes", _mib),
    Column("peak in prefill MiB", "peak_bytes", _mib),
    Column("prefill s", "prefill_seconds", _seconds),
    Column("compression s", "compression_seconds", _seconds),
)
TIME = (
    Column("ms/token", "step_ms", _seconds),
    Column("p90 ms", "step_ms_p90", _seconds),
    Column("speed / dense", "speedup_over_dense", _times),
    Column("speed / prealloc.", "speedup_over_preallocated", _times),
    Column("retrieval share", "retrieval_share", _percent),
    Column("hit rate", "hit_rate", _percent),
    Column("moved KiB/step", "moved_bytes_per_step", _kib),
)


def tables(context: Context) -> tuple[Table, Table]:
    """Memory (with prefill) and time of one context; columns that no row fills are left out."""
    order = "interleaved" if context.together else "one method after the other (memory)"
    memory = f"{context.tokens:,} tokens ({context.prompt}): K/V after the prompt"
    return (
        _table(memory, MEMORY, context.rows),
        _table(f"{context.tokens:,} tokens: decoding, steps {order}", TIME, context.rows),
    )


def _table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    used = [c for c in columns if any(getattr(row, c.field) is not None for row in rows)]
    for column in used:
        table.add_column(column.heading, justify="right")
    for row in rows:
        if not row.reason:
            table.add_row(row.method, *(_cell(row, column) for column in used))
    return table


def _cell(row: Row, column: Column) -> str:
    value = getattr(row, column.field)
    return "-" if value is None else column.write(value)


def missing(context: Context) -> list[str]:
    """A line for every method that could not run."""
    return [f"not run: {row.method}: {row.reason}" for row in context.rows if row.reason]


def notes(result: BenchResult) -> list[str]:
    """The regime, what the figures mean, and crossovers."""
    rows = [row for context in result.contexts for row in context.rows]
    lines = [
        str(result.regime),
        "ms/token: median of the steps; speed: the other cache's ms/token over this one's, above "
        "1 is faster; resident: after the prompt, by receipt",
    ]
    if any(row.compression_source == "difference" for row in rows):
        lines.append("compression s: prefill less the dense prefill, one run each")
    return lines + [_crossover(found) for found in result.crossovers]


def _crossover(found: Crossover) -> str:
    if found.tokens is None or found.saved_bytes is None:
        return f"crossover at budget {found.budget}: dense is faster at the longest context tried"
    return (
        f"crossover at budget {found.budget}: from {found.tokens:,} tokens on the profile is not "
        f"slower, and saves {_mib(found.saved_bytes)} MiB there"
    )
