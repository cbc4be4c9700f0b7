"""Grids with one character per head: columns are layers, rows KV heads or other figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from hkvprof.report.summary import percent


@dataclass(frozen=True)
class Glyphs:
    """One set of characters; `shades` are five, from light to dark. Styles are rich's."""

    static: str
    dynamic: str
    shades: str
    whole: str
    static_style: str = ""
    dynamic_style: str = ""


ASCII = Glyphs(static="#", dynamic="o", shades=".-=%@", whole="W")
UNICODE = Glyphs(
    static="■",
    dynamic="○",
    shades="·░▒▓█",
    whole="▲",
    static_style="blue",
    dynamic_style="yellow",
)


LAYERS_PER_BLOCK = 60
BOUNDS = (0.5, 0.8, 1.25, 2.0)
"""Where the five shades of a value begin, relative to the mean."""

Cell = Callable[[int, int], tuple[str, str]]
"""Glyph and style of (layer, row)."""


def heads_picture(layers: int, heads: int, legend: Text, cell: Cell) -> Text:
    """One row per KV head, under the legend."""
    return rows_picture(layers, [f"head {head:>3}" for head in range(heads)], legend, cell)


def rows_picture(layers: int, labels: Sequence[str], legend: Text, cell: Cell) -> Text:
    """The legend and the grid, wrapped after LAYERS_PER_BLOCK layers."""
    text = Text(no_wrap=True).append_text(legend)
    for start in range(0, layers, LAYERS_PER_BLOCK):
        block = range(start, min(layers, start + LAYERS_PER_BLOCK))
        text.append("\n" + _ruler(block) + "\n", "dim")
        for row, label in enumerate(labels):
            text.append(f"{label:<9}", "dim")
            for layer in block:
                text.append(*cell(layer, row))
            if row + 1 < len(labels):
                text.append("\n")
    return text


def shares_picture(shares: NDArray[np.floating], mean: float, marks: Glyphs) -> Text:
    """The share that every head keeps [layers, heads], shaded relative to `mean`."""
    layers, heads = shares.shape

    def cell(layer: int, head: int) -> tuple[str, str]:
        return shade(float(shares[layer, head]) / mean, marks), ""

    ranges = [f"< {percent(BOUNDS[0] * mean)}"]
    ranges += [f">= {percent(bound * mean)}" for bound in BOUNDS if bound * mean <= 1]
    legend = Text("Share kept: ")
    legend.append("  ".join(f"{s} {r}" for s, r in zip(marks.shades, ranges, strict=False)))
    return heads_picture(layers, heads, legend, cell)


def shade(relative: float, marks: Glyphs) -> str:
    """The shade of a value that is `relative` times the mean."""
    return marks.shades[sum(relative >= bound for bound in BOUNDS)]


def _ruler(block: range) -> str:
    """Layer numbers over every tenth column, a label before them."""
    line = ""
    for layer in block:
        if layer % 10 == 0:
            line = line.ljust(layer - block.start) + str(layer)
    return f"layer    {line}"
