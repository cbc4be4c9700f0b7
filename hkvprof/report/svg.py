"""Plots as SVG by hand: text, strokes, curves, axes; the same bytes for the same figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

PANEL_WIDTH, PANEL_HEIGHT = 380, 300
LEGEND_LINE = 19
_TICK = 5


@dataclass(frozen=True)
class Line:
    """One method: its look, and points (x, y) in the units of its axes; widths in px."""

    name: str
    colour: str
    dash: str
    points: tuple[tuple[float, float], ...]
    width: int = 2
    radius: int = 3


@dataclass(frozen=True)
class Frame:
    """Where a panel stands: its upper left corner in px."""

    left: float
    top: float

    @property
    def right(self) -> float:
        """The right edge in px."""
        return self.left + PANEL_WIDTH

    @property
    def bottom(self) -> float:
        """The lower edge in px."""
        return self.top + PANEL_HEIGHT


def document(width: float, height: float, title: str, body: Sequence[str]) -> str:
    """The whole SVG text, on white."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">',
            f"<title>{clean(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


def axes(
    frame: Frame,
    title: str,
    x_label: str,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
) -> list[str]:
    """Title, grid lines, ticks and both axes; ticks are (px, label), without a text where empty."""
    parts = [text(frame.left, frame.top - 12, title, size=12)]
    for y, label in y_ticks:
        parts.append(stroke(frame.left, y, frame.right, y, "#dddddd"))
        parts.append(text(frame.left - 8, y + 4, label, anchor="end"))
    for x, label in x_ticks:
        parts.append(stroke(x, frame.bottom, x, frame.bottom + _TICK, "#000000"))
        if label:
            parts.append(text(x, frame.bottom + 19, label, anchor="middle"))
    middle = frame.left + PANEL_WIDTH / 2
    parts.append(text(middle, frame.bottom + 38, x_label, "middle"))
    parts.append(stroke(frame.left, frame.bottom, frame.right, frame.bottom, "#000000"))
    parts.append(stroke(frame.left, frame.top, frame.left, frame.bottom, "#000000"))
    return parts


def curve(line: Line, points: Sequence[tuple[float, float]]) -> list[str]:
    """A polyline through points in px, which are marked, so that a single one is seen too."""
    path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    dots = (
        f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{line.radius}" fill="{line.colour}"/>'
        for x, y in points
        if line.radius
    )
    return [
        f'<polyline points="{path}" fill="none" stroke="{line.colour}" '
        f'stroke-width="{line.width}"{_dash(line.dash)}>'
        f"<title>{clean(line.name)}</title></polyline>",
        *dots,
    ]


def legend(lines: Sequence[Line], left: float, top: float) -> list[str]:
    """A sample of every line and its name, one below the other."""
    parts = []
    for number, line in enumerate(lines):
        y = top + 10 + number * LEGEND_LINE
        parts.append(stroke(left, y, left + 42, y, line.colour, line.dash, width=line.width))
        if line.radius:
            parts.append(
                f'<circle cx="{left + 21}" cy="{y}" r="{line.radius}" fill="{line.colour}"/>'
            )
        parts.append(text(left + 50, y + 4, line.name))
    return parts


def stroke(
    x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "", width: int = 1
) -> str:
    """A straight line."""
    return (
        f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{colour}" '
        f'stroke-width="{width}"{_dash(dash)}/>'
    )


def text(x: float, y: float, content: str, anchor: str = "start", size: int = 11) -> str:
    """One line of text; `y` is its base line."""
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size}" text-anchor="{anchor}">'
        f"{clean(content)}</text>"
    )


def clean(content: str) -> str:
    """Text fit for XML: escaped, and no control characters."""
    return escape("".join(c if c.isprintable() else "?" for c in content))


def round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= least * (1 - 1e-9))


def _dash(pattern: str) -> str:
    return f" stroke-dasharray={quoteattr(pattern)}" if pattern else ""
