"""Pictures of profiles: every head is drawn, in ASCII where asked, at any size."""

import io
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from hkvprof.heads import HeadGrid
from hkvprof.report import terminal
from hkvprof.report.terminal import ASCII, UNICODE
from tests.profiles import make_profile, plain_profile

PARTS = ("KV heads static", "Head types", "Share kept", "Strategies", "Borderline heads",
         "Provenance", "tasks: ocr 8, count 8", "versions: hkvprof", "example/model")  # fmt: skip


def text(page: RenderableType, width: int = 120, color: bool = False) -> str:
    stream = io.StringIO()
    system = "standard" if color else None
    Console(file=stream, width=width, force_terminal=color, color_system=system).print(page)
    return stream.getvalue()


def rows(page: str) -> list[str]:
    """The drawn rows, labels removed."""
    return [line[9:].rstrip() for line in page.splitlines() if line.startswith("head   ")]


def test_types_are_drawn_head_by_layer() -> None:
    drawn = rows(text(terminal.types_picture(make_profile(), ASCII)))
    assert drawn == ["#o#", "#o#"]
    assert rows(text(terminal.types_picture(make_profile(), UNICODE))) == ["■○■", "■○■"]


def test_budgets_are_shaded_relative_to_the_default() -> None:
    assert rows(text(terminal.budget_picture(make_profile(), ASCII))) == ["%%%", "---"]


def test_colour_only_where_the_console_has_it() -> None:
    page = terminal.overview(make_profile(), 32768, ascii_only=False)
    assert "\x1b[34m■" in text(page, color=True)
    assert "\x1b" not in text(page)


@pytest.mark.parametrize("recipe", ["paper", "measured", "uniform"])
def test_the_page_has_everything(recipe: str) -> None:
    page = text(terminal.overview(make_profile(recipe), 32768, ascii_only=True), width=200)
    assert page.isascii()
    for part in PARTS:
        assert part in page


def test_many_layers_are_wrapped_and_all_drawn() -> None:
    grid = HeadGrid(layers=150, query_heads=8, kv_heads=4, head_dim=64)
    page = text(terminal.types_picture(make_profile(grid=grid), ASCII), width=80)
    assert sum(map(len, rows(page))) == grid.total
    assert max(map(len, page.splitlines())) <= 80
    assert "layer    60" in page


def test_strangers_text_cannot_draw_on_the_terminal() -> None:
    odd = {"note": "\x1b[2J[bold]x[/bold]\nnext", "\x07key": ["a", {"b": 1.25}], "none": None}
    profile = replace(make_profile(), provenance=odd)
    page = text(terminal.overview(profile, 32768, ascii_only=True), width=200)
    assert "\x1b" not in page
    assert "\x07" not in page
    assert r"note: \x1b[2J[bold]x[/bold]\nnext" in page
    assert r"\x07key: a, b 1.25" in page


def test_a_layer_page_shows_decisions_and_curves() -> None:
    page = text(terminal.layer_page(make_profile(), 1, ascii_only=True), width=200)
    assert "Layer 1 of 3" in page
    assert "o dynamic" in page
    assert "* dynamic-mean-chunk16" in page
    assert page.count("static-pool31") == 2
    assert "+-" in page
    bare = replace(
        plain_profile(make_profile()), kappas=(),
        sparsity_mean=make_profile().sparsity_mean[:0].copy(),
        sparsity_std=make_profile().sparsity_std[:0].copy(),
    )  # fmt: skip
    assert "Layer 0 of 3" in text(terminal.layer_page(bare, 0, ascii_only=True), width=200)
