"""A benchmark as a picture: bytes and time over context length, written as SVG by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from hkvprof.bench.records import BenchResult, Row

WIDTH, PANEL_WIDTH, PANEL_HEIGHT = 1180, 380, 300
_TOP, _LEFT, _GAP = 58, 70, 90
_LEGEND_LINE = 19
_TICK = 5
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
class Line:
    """One method: its look, and points (context in tokens, value)."""

    name: str
    colour: str
    dash: str
    points: tuple[tuple[int, float], ...]


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
    height = max(_TOP + PANEL_HEIGHT + 84, _TOP + _LEGEND_LINE * (len(legend) + 1) + 40)
    body = [
        *(part for panel in panels for part in _draw(panel, contexts)),
        *_legend(legend),
        _text(_LEFT, 22, _heading(result), size=14),
        *(_text(_LEFT, height - 26 + 14 * n, line, size=10) for n, line in enumerate(footer)),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img">',
            f"<title>{escape(_heading(result))}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


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


def round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= least * (1 - 1e-9))


def _draw(panel: Panel, contexts: Sequence[int]) -> list[str]:
    """Axes, ticks and lines; the horizontal axis is logarithmic."""
    ticks = panel.ticks
    low, high = math.log2(contexts[0]), math.log2(contexts[-1])
    bottom, right = _TOP + PANEL_HEIGHT, panel.left + PANEL_WIDTH

    def x(tokens: int) -> float:
        part = (math.log2(tokens) - low) / (high - low) if high > low else 0.5
        return panel.left + (0.04 + 0.92 * part) * PANEL_WIDTH

    def y(value: float) -> float:
        return bottom - value / ticks[-1] * PANEL_HEIGHT

    parts = [_text(panel.left, _TOP - 12, f"{panel.title}, {panel.unit}", size=12)]
    for tick in ticks:
        parts.append(_stroke(panel.left, y(tick), right, y(tick), "#dddddd"))
        parts.append(_text(panel.left - 8, y(tick) + 4, f"{tick:g}", anchor="end"))
    every = math.ceil(len(contexts) / _MOST_X_LABELS)
    for number, tokens in enumerate(contexts):
        parts.append(_stroke(x(tokens), bottom, x(tokens), bottom + _TICK, "#000000"))
        if number % every == 0:
            parts.append(_text(x(tokens), bottom + 19, f"{tokens:,}", anchor="middle"))
    parts.append(_text(panel.left + PANEL_WIDTH / 2, bottom + 38, "context, tokens", "middle"))
    parts.append(_stroke(panel.left, bottom, right, bottom, "#000000"))
    parts.append(_stroke(panel.left, _TOP, panel.left, bottom, "#000000"))
    for line in panel.lines:
        parts += _curve(line, [(x(tokens), y(value)) for tokens, value in line.points])
    return parts


def _curve(line: Line, points: Sequence[tuple[float, float]]) -> list[str]:
    """A polyline with its points marked, so that a single one is seen too."""
    path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    dots = [f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3" fill="{line.colour}"/>' for x, y in points]
    return [
        f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"'
        f"{_dash(line.dash)}><title>{escape(line.name)}</title></polyline>",
        *dots,
    ]


def _legend(lines: Sequence[Line]) -> list[str]:
    left = _LEFT + 2 * PANEL_WIDTH + _GAP + 24
    parts = []
    for number, line in enumerate(lines):
        y = _TOP + 10 + number * _LEGEND_LINE
        parts.append(_stroke(left, y, left + 42, y, line.colour, line.dash, width=2))
        parts.append(f'<circle cx="{left + 21}" cy="{y}" r="3" fill="{line.colour}"/>')
        parts.append(_text(left + 50, y + 4, line.name))
    return parts


def _stroke(
    x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "", width: int = 1
) -> str:
    return (
        f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{colour}" '
        f'stroke-width="{width}"{_dash(dash)}/>'
    )


def _dash(pattern: str) -> str:
    return f" stroke-dasharray={quoteattr(pattern)}" if pattern else ""


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    clean = escape("".join(c if c.isprintable() else "?" for c in text))
    return f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size}" text-anchor="{anchor}">{clean}</text>'
