"""At 80 columns and fewer, and without a terminal, pages lose no column, number or word."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from rich.text import Text

from hkvprof.heads import HeadGrid
from hkvprof.report import terminal
from hkvprof.report.folding import FoldingTable, Grid
from tests.profiles import make_profile


def lines(page: RenderableType, width: int, terminal: bool = False) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, width=width, no_color=True, force_terminal=terminal)
    console.print(page)
    return stream.getvalue().splitlines()


def table() -> FoldingTable:
    made = FoldingTable("name", "long heading", "b", "c", right=["b"])
    made.add_row("first", "1234567890", "1", "x")
    made.add_row()
    made.add_row("2", Text("5"), "1,000", "")
    return made


WIDE = [
    "name   long heading      b  c",
    "first  1234567890        1  x",
    "",
    "2      5             1,000",
]
NARROW = [
    "name   long heading",
    "first  1234567890",
    "",
    "2      5",
    "",
    "name       b  c",
    "first      1  x",
    "",
    "2      1,000",
]


@pytest.mark.parametrize(("width", "expected"), [(30, WIDE), (200, WIDE)])
def test_columns_that_do_not_fit_go_on_below(width: int, expected: list[str]) -> None:
    assert lines(table(), width)[: len(expected)] == expected


def test_the_narrowest_form() -> None:
    assert lines(table(), 20) == NARROW


def test_a_cell_wider_than_the_console_is_folded() -> None:
    made = FoldingTable("name", "what")
    made.add_row("a", "0123456789" * 4)
    assert "".join("".join(lines(made, 20)).split()).endswith("0123456789" * 4)


CELL = st.text(st.sampled_from("ab1,%漢"), min_size=1, max_size=9)


@given(st.lists(st.lists(CELL, min_size=7, max_size=7), min_size=1, max_size=4),
       st.integers(34, 90))  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_nothing_is_lost_at_any_width(rows: list[list[str]], width: int) -> None:
    made = FoldingTable(*"ABCDEFG")
    for row in rows:
        made.add_row(*row)
    page = lines(made, width)
    assert all(Text(line).cell_len <= width for line in page)
    for row in rows:
        assert set(row) <= set(" ".join(page).split())


@pytest.mark.parametrize("width", [20, 45, 79, 80, 200])
def test_grids_wrap_in_tens_and_draw_every_cell(width: int) -> None:
    grid = Grid(83, ["a", "b"], Text("what"), lambda layer, row: ("xy"[row], ""))
    page = lines(grid, width)
    assert page[0] == "what"
    assert max(map(len, page)) <= width
    drawn = "".join(line[9:] for line in page if line[0] in "ab")
    assert (drawn.count("x"), drawn.count("y")) == (83, 83)


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("recipe", ["paper", "measured", "uniform"])
def test_inspect_loses_no_word(recipe: str, layer: int | None, width: int) -> None:
    grid = HeadGrid(layers=12, query_heads=28, kv_heads=4, head_dim=64)
    profile = make_profile(recipe, grid=grid)
    profile = replace(profile, provenance={**profile.provenance, "data_digest": "0123456789" * 7})

    def page() -> RenderableType:
        if layer is None:
            return terminal.overview(profile, 32768, ascii_only=True)
        return terminal.layer_page(profile, layer, ascii_only=True)

    narrow, wide = lines(page(), width), lines(page(), 2000)
    assert max(map(len, narrow)) <= width
    assert not any("…" in line for line in narrow)
    joined = "".join("".join(narrow).split())
    assert all(word in joined for word in " ".join(wide).split())
