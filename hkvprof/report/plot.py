"""A benchmark as a picture: bytes and time over context length, written as SVG by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hkvprof.bench.records import BenchResult, Row
from hkvprof.report import svg
from hkvprof.report.svg import LEGEND_LINE, PANEL_HEIGHT, PANEL_WIDTH, Frame, Line, round_step

WIDTH = 1180
_TOP, _LEFT, _GAP = 58, 70, 90
_MOST_X_LABELS = 8
COLOURS = {
    "dense": "#000000",
    "preallocated": "#7f7f7f",
    "static": "#0072b2",
    "dynamic": "#e69f00",
    "profile": "#d55e00",
}
"""By kind of method; from the palette of Okabe and Ito, told apart by the colour-blind."""
PREALLOCATED_DASH = "1 3"
DASHES = ("", "8 4", "2 3", "8 3 2 3", "14 5", "4 2 1 2 1 2")
"""By budget, in the order of the budgets."""


@dataclass(frozen=True)
class Panel:
    """One picture with its own vertical axis, which starts at zero; `left` in px."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    left: float

    @property
    def ticks(self) -> list[float]:
        """Round values from zero to at least the greatest."""
        top = max((value for line in self.lines for _, value in line.points), default=1.0)
        step = round_step((top or 1.0) / 4)
        return [step * number for number in range(math.ceil((top or 1.0) / step - 1e-9) + 1)]


def bench_plot(result: BenchResult) -> str:
    """The SVG text; the same for the same result."""
    contexts = [context.tokens for context in result.contexts]
    panels = (
        _panel(result, "Resident K/V after the prompt", "MiB", _LEFT,
               lambda row: None if row.resident_bytes is None else row.resident_bytes / 2**20),
        _panel(result, "Decoding", "ms per token", _LEFT + PANEL_WIDTH + _GAP,
               lambda row: row.step_ms),
    )  # fmt: skip
    legend = panels[0].lines
    footer = _footer(result)
    height = max(_TOP + PANEL_HEIGHT + 84, _TOP + LEGEND_LINE * (len(legend) + 1) + 40)
    body = [
        *(part for panel in panels for part in _draw(panel, contexts)),
        *svg.legend(legend, _LEFT + 2 * PANEL_WIDTH + _GAP + 24, _TOP),
        svg.text(_LEFT, 22, _heading(result), size=14),
        *(svg.text(_LEFT, height - 26 + 14 * n, line, size=10) for n, line in enumerate(footer)),
    ]
    return svg.document(WIDTH, height, _heading(result), body)


def _heading(result: BenchResult) -> str:
    regime = result.regime
    return f"{regime.model}, batch {regime.batch}, {regime.dtype}: dense and compressed KV cache"


def _footer(result: BenchResult) -> list[str]:
    regime = result.regime
    versions = ", ".join(f"{name} {version}" for name, version in regime.versions.items())
    return [f"{regime.device}, {regime.threads} threads, kernels: {regime.kernels}", versions]


def _panel(
    result: BenchResult,
    title: str,
    unit: str,
    left: float,
    value: Callable[[Row], float | None],
) -> Panel:
    kinds = {row.method: row for context in result.contexts for row in context.rows}
    budgets = list(dict.fromkeys(row.budget for row in kinds.values() if row.budget))
    lines = []
    for name in result.methods:
        row = kinds[name]
        points = _points(result, name, value)
        dash = PREALLOCATED_DASH if row.kind == "preallocated" else ""
        if row.budget:
            dash = DASHES[budgets.index(row.budget) % len(DASHES)]
        if points:
            lines.append(Line(name, COLOURS[row.kind], dash, points))
    return Panel(title, unit, tuple(lines), left)


def _points(
    result: BenchResult, name: str, value: Callable[[Row], float | None]
) -> tuple[tuple[int, float], ...]:
    found = []
    for context in result.contexts:
        row = context.row(name)
        figure = None if row is None else value(row)
        if figure is not None:
            found.append((context.tokens, figure))
    return tuple(found)


def _draw(panel: Panel, contexts: Sequence[int]) -> list[str]:
    """Axes, ticks and lines; the horizontal axis is logarithmic."""
    ticks = panel.ticks
    low, high = math.log2(contexts[0]), math.log2(contexts[-1])
    frame = Frame(panel.left, _TOP)

    def x(tokens: float) -> float:
        part = (math.log2(tokens) - low) / (high - low) if high > low else 0.5
        return frame.left + (0.04 + 0.92 * part) * PANEL_WIDTH

    def y(value: float) -> float:
        return frame.bottom - value / ticks[-1] * PANEL_HEIGHT

    every = math.ceil(len(contexts) / _MOST_X_LABELS)
    parts = svg.axes(
        frame,
        f"{panel.title}, {panel.unit}",
        "context, tokens",
        [(x(c), "" if n % every else f"{c:,}") for n, c in enumerate(contexts)],
        [(y(tick), f"{tick:g}") for tick in ticks],
    )
    for line in panel.lines:
        parts += svg.curve(line, [(x(tokens), y(value)) for tokens, value in line.points])
    return parts
