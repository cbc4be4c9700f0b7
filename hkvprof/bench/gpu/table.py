"""The benchmark as text: plain columns, because nothing else may be installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hkvprof.bench.gpu.records import Cell, Result
from hkvprof.bench.gpu.targets import check_targets

_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("held MiB", "held_bytes", lambda v: f"{v / 2**20:,.0f}"),
    ("share", "held_share", lambda v: f"{v:.1%}"),
    ("host MiB", "host_bytes", lambda v: f"{v / 2**20:,.0f}"),
    ("ms/token", "step_ms", lambda v: f"{v:.2f}"),
    ("p90", "step_ms_p90", lambda v: f"{v:.2f}"),
    ("x stock", "over_dynamic_cache", lambda v: f"{v:.2f}"),
    ("x dense", "over_best_dense", lambda v: f"{v:.2f}"),
    ("of ceiling", "ceiling_share", lambda v: f"{v:.0%}"),
    ("of bound", "bound_share", lambda v: f"{v:.0%}"),
    ("attend ms", "attend_ms", lambda v: f"{v:.3f}"),
    ("of copy", "bandwidth_share", lambda v: f"{v:.0%}"),
    ("hits", "hit_rate", lambda v: f"{v:.0%}"),
    ("moved KiB", "moved_bytes", lambda v: f"{v / 1024:,.0f}"),
    ("exposed", "exposed_share", lambda v: f"{v:.1%}"),
    ("corrected", "corrected_share", lambda v: f"{v:.0%}"),
)
NO_GPU = "Not on a GPU: times mean nothing here, nor do ratios and verdicts made of them."
LEGEND = (
    "held: on the device, by the allocator (on a CPU: by tensors), without index tables, which a "
    "model needs once. x stock: DynamicCache's ms/token "
    "over this one's; x dense: the best dense cache's. of ceiling: that over (W + kBT) / (W + "
    "resident). of bound: reading weights and K/V at the copy bandwidth, over ms/token. of copy: "
    "bandwidth of attention alone over the card's. moved: from the host per step, reranked keys "
    "included. exposed: of a step, gone when items lie on the device."
)


def render(result: Result) -> str:
    """Regime, links, prefill, a table per cell, targets, and what is left to do."""
    links = result.links
    lines = [] if result.on_gpu else [NO_GPU]
    lines += [
        str(result.regime),
        f"copy {links.copy:,.0f} GB/s on the card (read and written), host link "
        f"{links.from_host:.1f} GB/s to the card, {links.to_host:.1f} GB/s back; "
        f"{links.megabytes:g} MiB pinned",
    ]
    lines += [
        f"prefill of {one.tokens:,} tokens, {one.method}: {one.seconds:.3f} s to the first token, "
        f"dense {one.dense_seconds:.3f} s: compression {one.overhead_share:.2%}"
        for one in result.prefill
    ]
    for cell in result.cells:
        lines += ["", *_cell(cell)]
    lines += ["", LEGEND, ""]
    lines += _columns([["target", "", "found"], *([t.wanted, t.verdict, t.found]
                                                  for t in check_targets(result))])  # fmt: skip
    if result.left:
        left = ", ".join(f"{context:,} x {batch}" for context, batch in result.left)
        lines += ["", f"not run yet: {left}. The same command goes on from here."]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell) -> list[str]:
    rows = [row for row in cell.rows if not row.reason]
    used = [c for c in _COLUMNS if any(getattr(row, c[1]) is not None for row in rows)]
    table = [["", *(heading for heading, _, _ in used)]]
    for row in rows:
        values = [getattr(row, name) for _, name, _ in used]
        cells = [
            "-" if value is None else write(value)
            for value, (_, _, write) in zip(values, used, strict=True)
        ]
        table.append([row.method, *cells])
    sets = len({row.group for row in rows})
    order = "steps of all in turn" if sets < 2 else f"steps in turn within {sets} sets (memory)"
    title = f"{cell.context:,} tokens, batch {cell.batch}: {order}"
    return [title, *_columns(table), *_missing(cell)]


def _missing(cell: Cell) -> list[str]:
    return [f"not run: {row.method}: {row.reason}" for row in cell.rows if row.reason]


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Left-justified columns; all but the first of figures to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    figures = len(widths) > 3
    return [
        "  ".join(
            cell.rjust(width) if figures and number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
