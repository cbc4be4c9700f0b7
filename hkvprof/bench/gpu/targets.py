"""What the figures were to be, and whether they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hkvprof.bench.gpu.entrants import Method
from hkvprof.bench.gpu.records import Cell, Result, Row

CONTEXT = 32768
SHARE_TOLERANCE = 0.02
"""By how much of itself a budget may be exceeded by the allocator's count: blocks of 512 bytes."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """`verdict`: met, not met, not measured, or does not apply. `found` names the worst figure."""

    wanted: str
    verdict: str
    found: str


def check_targets(result: Result) -> list[Target]:
    """All of them; each is judged by the worst row that it speaks of."""
    middle = result.regime.budgets[len(result.regime.budgets) // 2]
    hybrid = Method("hybrid", middle).name
    at_32k = [(cell, row) for cell, row in result.rows() if cell.context == CONTEXT]
    return [
        _worst(
            f"decode attention >= 80% of the copy bandwidth at {CONTEXT:,} tokens (whole, static)",
            [(c, r) for c, r in at_32k if r.mode == "graph" and r.types in ("whole", "static")],
            lambda row: row.bandwidth_share, 0.80, at_least=True, percent=True,
        ),
        _worst(
            "a step >= 85% of the ceiling's speed-up at batch 8 and 32 (hybrid, over the best "
            "dense cache)",
            [(c, r) for c, r in result.rows()
             if c.batch in (8, 32) and r.types == "hybrid" and r.mode == "graph"],
            lambda row: row.ceiling_share, 0.85, at_least=True, percent=True,
        ),
        *(
            _worst(
                f">= 1.8x over transformers' DynamicCache at {CONTEXT:,} tokens, batch 1 "
                f"({name})",
                [(c, r) for c, r in at_32k if c.batch == 1 and r.method == name],
                lambda row: row.over_dynamic_cache, 1.8, at_least=True, percent=False,
            )
            for name in (hybrid, Method("hybrid", middle, "eager").name)
        ),
        _against_static(result, middle),
        _worst(
            "exposed transfer <= 5% of a step (hybrid)",
            [(c, r) for c, r in result.rows() if r.method == hybrid],
            lambda row: row.exposed_share, 0.05, at_least=False, percent=True,
        ),
        _prefill(result),
        _shares(result),
    ]  # fmt: skip


def _worst(
    wanted: str,
    rows: Iterable[tuple[Cell, Row]],
    figure: Callable[[Row], float | None],
    bound: float,
    *,
    at_least: bool,
    percent: bool,
) -> Target:
    found = [(figure(row), cell, row) for cell, row in rows]
    known = [(value, cell, row) for value, cell, row in found if value is not None]
    if not known:
        return Target(wanted, NOT_MEASURED, "")
    value, cell, row = (min if at_least else max)(known, key=lambda one: one[0])
    good = value >= bound if at_least else value <= bound
    text = f"{value:.1%}" if percent else f"{value:.2f}x"
    where = f"{text}, {row.method} at {cell.context:,} x {cell.batch}"
    where += f" (the worst of {len(known)})" if len(known) > 1 else ""
    return Target(wanted, "met" if good else "not met", where)


def _against_static(result: Result, middle: str) -> Target:
    wanted = "hybrid <= 1.04x the latency of all-static where the host link is PCIe 5"
    if not result.links.is_pcie_5:
        return Target(
            wanted, "does not apply", f"the host link gives {result.links.from_host:.1f} GB/s"
        )
    pairs = []
    for cell in result.cells:
        mine, other = (cell.row(Method(types, middle).name) for types in ("hybrid", "static"))
        if mine is not None and other is not None:
            assert mine.step_ms is not None
            assert other.step_ms is not None
            pairs.append((mine.step_ms / other.step_ms, cell))
    if not pairs:
        return Target(wanted, NOT_MEASURED, "")
    value, cell = max(pairs, key=lambda one: one[0])
    found = f"{value:.3f}x at {cell.context:,} x {cell.batch} (the worst of {len(pairs)})"
    return Target(wanted, "met" if value <= 1.04 else "not met", found)


def _prefill(result: Result) -> Target:
    wanted = "compression <= 1.5% of the time to the first token (hybrid)"
    found = [one for one in result.prefill if one.method.startswith("hybrid")]
    if not found:
        return Target(wanted, NOT_MEASURED, "")
    one = max(found, key=lambda prefill: prefill.overhead_share)
    where = f"{one.overhead_share:.2%} at {one.tokens:,} tokens, batch 1"
    return Target(wanted, "met" if one.overhead_share <= 0.015 else "not met", where)


def _shares(result: Result) -> Target:
    wanted = f"all-in share as promised, by the allocator (within {SHARE_TOLERANCE:.0%} of it)"
    found = [
        (row.held_share / float(row.budget), cell, row)
        for cell, row in result.rows()
        if row.held_share is not None and row.budget and row.types != "whole"
    ]
    if not found:
        return Target(wanted, NOT_MEASURED, "")
    value, cell, row = max(found, key=lambda one: one[0])
    assert row.held_share is not None
    where = f"{row.held_share:.2%}, {row.method} at {cell.context:,} x {cell.batch} "
    where += f"(the worst of {len(found)})"
    return Target(wanted, "met" if value <= 1 + SHARE_TOLERANCE else "not met", where)
