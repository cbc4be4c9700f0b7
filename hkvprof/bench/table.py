"""A benchmark as text: plain columns, because on a bare machine nothing else may be installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hkvprof.bench.compare import check_targets
from hkvprof.bench.records import BenchResult, Context, Crossover, Row


@dataclass(frozen=True)
class BenchColumn:
    """A heading, where its figure stands in a row, and how it is written."""

    heading: str
    field: str
    write: Callable[[float], str]


def _mib(value: float) -> str:
    return f"{value / 2**20:,.2f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _finely(value: float) -> str:
    return f"{value:.2%}"


def _number(value: float) -> str:
    return f"{value:.3f}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _kib(value: float) -> str:
    return f"{value / 1024:,.1f}"


MEMORY = (
    BenchColumn("resident MiB", "resident_bytes", _mib),
    BenchColumn("of dense", "dense_share", _percent),
    BenchColumn("tensors MiB", "storage_bytes", _mib),
    BenchColumn("held MiB", "held_bytes", _mib),
    BenchColumn("of dense", "held_share", _percent),
    BenchColumn("host MiB", "host_bytes", _mib),
    BenchColumn("peak MiB", "peak_bytes", _mib),
    BenchColumn("prefill s", "prefill_seconds", _number),
    BenchColumn("compr. s", "compression_seconds", _number),
)
TIME = (
    BenchColumn("ms/token", "step_ms", _number),
    BenchColumn("p90 ms", "step_ms_p90", _number),
    BenchColumn("x dense", "speedup_over_dense", _times),
    BenchColumn("x prealloc.", "speedup_over_preallocated", _times),
    BenchColumn("x best", "speedup_over_best", _times),
    BenchColumn("of ceiling", "ceiling_share", _percent),
    BenchColumn("of bound", "bound_share", _percent),
    BenchColumn("attend ms", "attend_ms", _number),
    BenchColumn("of copy", "bandwidth_share", _percent),
    BenchColumn("retrieval", "retrieval_share", _percent),
    BenchColumn("hit rate", "hit_rate", _percent),
    BenchColumn("moved KiB", "moved_bytes", _kib),
    BenchColumn("reads", "read_share", _finely),
    BenchColumn("at most", "limit_share", _finely),
    BenchColumn("exposed", "exposed_share", _percent),
    BenchColumn("corrected", "corrected_share", _percent),
)
NO_GPU = "Not on a GPU: times mean nothing here, nor do ratios and verdicts made of them."
LEGEND = (
    "ms/token: median of the steps; x: the other cache's ms/token over this one's, above 1 is "
    "faster; resident: after the prompt, by receipt; held: by the allocator (CPU: growth of the "
    "process; filled caches: by tensors); reads: from the host per step, over dense bytes, and the "
    "most that any step can read"
)
FILLED_LEGEND = (
    "bytes are without index tables, which a model needs once. x dense: over DynamicCache; x best: "
    "over the best dense cache. of ceiling: that over (W + kBT) / (W + resident). of bound: "
    "reading weights and K/V at the copy bandwidth, over ms/token. of copy: bandwidth of attention "
    "alone over the card's. moved: from the host per step, reranked keys included. exposed: "
    "of a step, gone when items lie on the device"
)


def render(result: BenchResult) -> str:
    """A pair of tables per context, what they mean, and what is left to do."""
    no_gpu = result.regime.filled and not result.regime.device.startswith("cuda")
    lines = [NO_GPU, ""] if no_gpu else []
    for context in result.contexts:
        for table in tables(context):
            lines += [*table, ""]
        lines += [*missing(context), ""] if missing(context) else []
    lines += notes(result)
    if result.links is not None:
        found = [[t.wanted, t.verdict, t.found] for t in check_targets(result)]
        lines += ["", *_columns([["target", "", "found"], *found], figures=False)]
    if result.left:
        left = ", ".join(f"{tokens:,} x {batch}" for tokens, batch in result.left)
        lines += ["", f"not run yet: {left}. The same command goes on from here."]
    return "\n".join(lines) + "\n"


def tables(context: Context) -> tuple[list[str], list[str]]:
    """Memory (with prefill) and time, line by line; columns that no row fills are left out."""
    title = f"{context.tokens:,} tokens ({context.prompt}), batch {context.batch}"
    order = "interleaved"
    if context.groups > 1:
        order = f"interleaved within {context.groups} sets (memory)"
    if context.groups == len(context.ran) > 1:
        order = "one method after the other (memory)"
    return (
        _table(f"{title}: K/V after the prompt", MEMORY, context.ran),
        _table(f"{title}: decoding, steps {order}", TIME, context.ran),
    )


def missing(context: Context) -> list[str]:
    """A line for every method that could not run."""
    return [f"not run: {row.method}: {row.reason}" for row in context.rows if row.reason]


def notes(result: BenchResult) -> list[str]:
    """The regime, the machine's links and prefill, what the figures mean, and crossovers."""
    rows = [row for context in result.contexts for row in context.rows]
    lines = [str(result.regime)]
    if (links := result.links) is not None:
        lines.append(
            f"copy {links.copy:,.0f} GB/s on the card (read and written), host link "
            f"{links.from_host:.1f} GB/s to the card, {links.to_host:.1f} GB/s back; "
            f"{links.megabytes:g} MiB pinned"
        )
    lines += [
        f"prefill of {one.tokens:,} tokens, {one.method}: {one.seconds:.3f} s to the first token, "
        f"dense {one.dense_seconds:.3f} s: compression {one.overhead_share:.2%}"
        for one in result.prefill
    ]
    lines += [f"no prefill times: {result.no_prefill}"] if result.no_prefill else []
    lines += [LEGEND, *([FILLED_LEGEND] if result.regime.filled else [])]
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


def _table(title: str, columns: Sequence[BenchColumn], rows: Sequence[Row]) -> list[str]:
    used = [c for c in columns if any(getattr(row, c.field) is not None for row in rows)]
    cells = [[row.method, *(_cell(row, column) for column in used)] for row in rows]
    return [title, *_columns([["", *(column.heading for column in used)], *cells])]


def _cell(row: Row, column: BenchColumn) -> str:
    value = getattr(row, column.field)
    return "-" if value is None else column.write(value)


def _columns(table: Sequence[Sequence[str]], figures: bool = True) -> list[str]:
    """Columns two blanks apart; the first to the left, `figures` to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if figures and number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
