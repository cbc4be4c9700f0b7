"""Tables and grids that lose nothing on a narrow terminal: what is too wide goes on below."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

GAP = "  "
LEAST_LAYERS, MOST_LAYERS = 10, 60
"""Columns of a grid side by side, at the least and the most."""
_LABEL = 9

Cell = Callable[[int, int], tuple[str, str]]
"""Glyph and style of (layer, row)."""


class FoldingTable:
    """Columns without lines between them. Where they are wider than the console, those that do not
    fit go on below, under the first `keys` columns once more."""

    def __init__(
        self, *headings: str, keys: int = 1, right: Iterable[str] = (), gap: str = GAP
    ) -> None:
        self.headings, self.keys, self.gap = headings, keys, gap
        self.right = {number for number, name in enumerate(headings) if name in set(right)}
        self.rows: list[list[Text]] = []

    def add_row(self, *cells: str | Text) -> None:
        """One cell per column; none for an empty line."""
        assert len(cells) in (0, len(self.headings))
        self.rows.append([Text(cell) if isinstance(cell, str) else cell for cell in cells])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, columns in enumerate(self._parts(options.max_width)):
            if number:
                yield Text()
            yield self._line([Text(name, "bold") for name in self.headings], columns)
            for row in self.rows:
                yield self._line(row, columns) if row else Text()

    def _width(self, column: int) -> int:
        cells = [row[column].plain for row in self.rows if row]
        return max(map(cell_len, [self.headings[column], *cells]))

    def _parts(self, room: int) -> list[list[int]]:
        """Which columns stand side by side."""
        keys = list(range(self.keys))
        taken = sum(self._width(key) + len(self.gap) for key in keys)
        parts, width = [list(keys)], taken
        for column in range(self.keys, len(self.headings)):
            wide = self._width(column)
            if width + wide > room and len(parts[-1]) > self.keys:
                parts.append(list(keys))
                width = taken
            parts[-1].append(column)
            width += wide + len(self.gap)
        return parts

    def _line(self, cells: Sequence[Text], columns: Sequence[int]) -> Text:
        line = Text(overflow="fold")
        for place, column in enumerate(columns):
            cell, width = cells[column], self._width(column)
            space = " " * (width - cell_len(cell.plain))
            before, after = (space, "") if column in self.right else ("", space)
            line.append(self.gap if place else "").append(before).append_text(cell).append(after)
        line.rstrip()
        return line


@dataclass(frozen=True)
class Grid:
    """One character per layer (columns) and thing asked of it (rows), under a legend; wrapped after
    as many layers as there is room for, in tens."""

    layers: int
    labels: Sequence[str]
    legend: Text
    cell: Cell

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.legend
        tens = (options.max_width - _LABEL) // 10 * 10
        wide = min(MOST_LAYERS, max(LEAST_LAYERS, tens))
        for start in range(0, self.layers, wide):
            block = range(start, min(self.layers, start + wide))
            yield Text(f"{'layer':<{_LABEL}}{_ruler(block)}", "dim")
            for row, label in enumerate(self.labels):
                line = Text(no_wrap=True).append(f"{label:<{_LABEL}}", "dim")
                for layer in block:
                    line.append(*self.cell(layer, row))
                yield line


def _ruler(block: range) -> str:
    """Layer numbers over every tenth column."""
    line = ""
    for layer in block:
        if layer % 10 == 0:
            line = line.ljust(layer - block.start) + str(layer)
    return line
