"""The page and the JSON of `plan`: every figure is the plan's, every layer is drawn."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from hkvprof.heads import HeadGrid
from hkvprof.profile.capacity import Room, find_fit
from hkvprof.profile.forecast import Forecast
from hkvprof.profile.record import Profile
from hkvprof.report.forecast import Outlook, page, sentences, to_json
from hkvprof.report.summary import human
from tests.profiles import make_profile

TOKENS, ROWS = 4096, 2


def outlook(
    profile: Profile, gpu: int | None = None, budgets: tuple[float, ...] = (0.1,)
) -> Outlook:
    """For two prompts of 768 KiB each, with 100 KiB of weights where `gpu` (KiB) is given."""

    def ask(share: float, tokens: int, rows: int) -> Forecast:
        return profile.plan(share, tokens, rows=rows)

    room = None if gpu is None else Room(gpu * 1024, 100 * 1024, 0)
    fit = None if room is None else find_fit(ask, TOKENS, ROWS, 0.1, room)
    plans = {str(budget): ask(budget, TOKENS, ROWS) for budget in budgets}
    return Outlook(
        dtype="bfloat16",
        dense=ask(1.0, TOKENS, ROWS),
        budgets=tuple(plans.items()),
        drawn=next(iter(plans.values())),
        fit=fit,
        min_tokens=256,
    )


def text(shown: Outlook, width: int = 200) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(page(shown, ascii_only=True))
    return stream.getvalue()


def test_the_dense_cache_comes_first() -> None:
    assert sentences(outlook(make_profile())) == [
        "2 prompts of 4,096 tokens need 1.5 MiB of dense keys and values in bfloat16."
    ]


def test_what_fits_says_so() -> None:
    first, reach = sentences(outlook(make_profile(), gpu=2048))
    assert first.endswith(
        "; with 100 KiB of weights and 0 B in reserve that is 1.6 MiB of 2 MiB: it fits."
    )
    assert reach.startswith("The default budget of 10% takes 2 prompts of up to ")
    assert "at 4,096 tokens (dense: 2)." in reach


def test_what_does_not_fit_says_which_budget_does() -> None:
    shown = outlook(make_profile(), gpu=1400)
    first, best, _ = sentences(shown)
    assert first.endswith("that is 1.6 MiB of 1.37 MiB: it does not fit.")
    assert shown.fit is not None
    assert shown.fit.best is not None
    share = f"{100 * shown.fit.best.share:.4g}%"
    assert best.startswith(f"The largest budget that fits is {share}: ")
    assert f"{shown.fit.best.peak_bytes / 2**20:.3g} MiB at the peak" in best


def test_what_never_fits_says_why() -> None:
    lines = sentences(outlook(make_profile(), gpu=400))
    assert lines[1].startswith("Not even the smallest budget does, 0.32%: it needs ")
    assert lines[1].endswith(" at its peak, and 300 KiB are left.")
    none = sentences(outlook(make_profile(), gpu=90))
    assert sentences(outlook(make_profile(), gpu=101))[2] == (
        "The default budget of 10% takes no prompt of any length."
    )
    assert none[1] == "Nothing fits: weights and reserve alone take 100 KiB of 90 KiB."


def test_short_prompts_are_told_apart() -> None:
    shown = replace(outlook(make_profile()), min_tokens=5000)
    assert "stay dense at run time" in sentences(shown)[-1]


def test_the_table_holds_the_plans_figures() -> None:
    shown = outlook(make_profile(), gpu=1400, budgets=(0.2, 0.03))
    plan = shown.budgets[0][1]
    assert isinstance(plan, Forecast)
    lines = text(shown).splitlines()
    row = next(line for line in lines if line.startswith("0.2 ")).split("  ")
    cells = [cell.strip() for cell in row if cell.strip()]
    assert cells[1:3] == [human(plan.resident_bytes), f"{100 * plan.resident_share:.3g}%"]
    sizes = (plan.table_bytes, plan.device_bytes, plan.peak_bytes)
    assert cells[3:6] == [human(size) for size in sizes]
    assert plan.relative_loss is not None
    told = (plan.read_share, plan.most_read_share, plan.static_share)
    assert cells[7:10] == [f"{100 * share:.3g}%" for share in told]
    assert cells[10] == f"{plan.expected_loss:.3g} ({100 * plan.relative_loss:.3g}%)"
    assert cells[11] == "yes"
    low = next(line for line in lines if line.startswith("0.03 "))
    assert ">= " in low
    assert any("less than 6.25%, the least share measured" in line for line in lines)


def test_a_budget_without_a_plan_says_why() -> None:
    shown = replace(outlook(make_profile()), budgets=(("0.001", "0.001: too small"),), drawn=None)
    lines = text(shown).splitlines()
    assert lines[-1] == "0.001: too small"
    assert next(line for line in lines if line.startswith("0.001 ")).split()[1:] == ["-"] * 10
    assert to_json(shown)["budgets"] == [{"budget": "0.001", "error": "0.001: too small"}]
    assert to_json(shown)["plan"] is None


@pytest.mark.parametrize("budget", [0.2, 0.6, 1.0])
def test_every_head_and_layer_is_drawn(budget: float) -> None:
    grid = HeadGrid(layers=70, query_heads=8, kv_heads=4, head_dim=64)
    shown = outlook(make_profile(grid=grid), budgets=(budget,))
    drawn = [line[9:].rstrip() for line in text(shown).splitlines() if line.startswith("head   ")]
    kinds, shares = drawn[:8], drawn[8:]
    assert sum(map(len, kinds)) == sum(map(len, shares)) == grid.total
    plan = shown.drawn
    assert plan is not None
    glyphs = {"static": "#", "dynamic": "o", "whole": "W"}
    for head in range(4):
        row = kinds[head] + kinds[head + 4]
        assert row == "".join(glyphs[layer.heads[head].kind] for layer in plan.layers)
    sums = [line[9:].rstrip() for line in text(shown).splitlines() if line[:9] == "resident "]
    assert sum(map(len, sums)) == 70


def test_layers_are_shaded_by_their_sums() -> None:
    """Three layers with 1, 1 and 4 times a loss: half the mean, and twice of it."""
    shown = outlook(make_profile())
    assert shown.drawn is not None
    layers = [
        replace(
            layer, heads=tuple(replace(h, loss=float(n), resident_bytes=10) for h in layer.heads)
        )
        for n, layer in zip((1, 1, 4), shown.drawn.layers, strict=True)
    ]
    lines = text(replace(shown, drawn=replace(shown.drawn, layers=tuple(layers)))).splitlines()
    assert [line.split()[1] for line in lines[-2:]] == ["===", "--@"]


@pytest.mark.parametrize("recipe", ["measured", "paper", "uniform"])
@pytest.mark.parametrize("gpu", [None, 90, 400, 1400, 2048])
def test_all_of_it_is_json_and_ascii(recipe: str, gpu: int | None) -> None:
    shown = outlook(make_profile(recipe), gpu, budgets=(0.5,))
    record = to_json(shown)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert text(shown).isascii()
    assert (record["fit"] is None) == (gpu is None)
    assert record["plan"]["resident_bytes"] == record["budgets"][0]["resident_bytes"]
    if gpu:
        assert record["budgets"][0]["fits"] == (
            record["budgets"][0]["peak_bytes"] <= record["fit"]["left_bytes"]
        )
    assert ("unknown" in text(shown)) == (recipe == "uniform")
