"""The picture is sound XML, and its points lie where the values say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from hkvprof.evaluate.records import FULL, OURS
from hkvprof.evaluate.statistics import BootstrapInterval, MethodSummary
from hkvprof.report.plot import COLOURED, OTHER_COLOUR, OURS_COLOUR, quality_figure, quality_plot
from tests.report.drawn import (
    check_texts_stay_apart_and_inside,
    curves,
    dash,
    legend,
    styled,
    svg_texts,
)
from tests.report.test_comparison import full, summary

PUBLIC = {f"public{n:02}" for n in range(20)}


def at(method: str, share: float, score: float, kl: float, regime: str = "inside") -> MethodSummary:
    return summary(
        method, str(share), regime=regime, share=share, score=score, score_share=score,
        difference=BootstrapInterval(score - 1, score - 1, score - 1, 4),
        kl=BootstrapInterval(kl, kl, kl, 4),
    )  # fmt: skip


def field(regime: str = "inside") -> list[MethodSummary]:
    """Full, ours, 20 public baselines (00 is the best) and two ablations at three budgets."""
    rows = [full(regime=regime, score_share=1.0, kl=BootstrapInterval(0.0, 0.0, 0.0, 4))]
    methods = [OURS, *sorted(PUBLIC), "ablation<b>", "ablation a"]
    for number, method in enumerate(methods):
        for share in (0.2, 0.1, 0.02):
            rows.append(at(method, share, 0.9 - number / 40 + share / 4, 0.01 / share, regime))
    return rows


def draw(rows: list[MethodSummary]) -> Figure:
    return styled(quality_figure, rows, PUBLIC, "a heading", ["ocr & more", "needle"])


def plot(rows: list[MethodSummary]) -> str:
    return quality_plot(rows, PUBLIC, "org/<model>", ["ocr & more", "needle"], 1234, "bfloat16")


def labels(axis: object) -> list[str]:
    """Labels within an axis."""
    low, high = axis.get_view_interval()
    return [
        tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
    ]


def test_points_lie_where_the_values_say() -> None:
    """Linear in score, logarithmic in KL and share, and so labelled."""
    values = [(0.02, 0.4, 0.5), (0.1, 0.75, 0.05), (0.5, 1.0, 0.004)]
    figure = draw([full(score_share=1.0), *(at(OURS, *value) for value in values)])
    for number, axes in enumerate(figure.axes):
        assert axes.get_xscale() == "log"
        assert labels(axes.xaxis) == ["1%", "2%", "5%", "10%", "20%", "50%", "100%"]
        ticks = [t.get_loc() for t in axes.xaxis.get_major_ticks()]
        assert set(ticks) >= {0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0}
        assert axes.get_yscale() == ("linear", "log")[number]
        (points,) = (
            [(float(x), float(y)) for x, y in line.get_xydata()]
            for line in axes.lines
            if line.get_label() == OURS
        )
        assert points == [(share, figures[number]) for share, *figures in values]
        for tick in axes.yaxis.get_major_ticks():
            assert float(tick.label1.get_text().replace("\N{MINUS SIGN}", "-")) == pytest.approx(
                tick.get_loc(), rel=1e-6
            )


def test_the_full_cache_is_a_dashed_level_at_one() -> None:
    figure = draw(field())
    ((_, points, line),) = (entry for entry in curves(figure) if entry[0] == FULL)
    left, right = figure.axes[0].get_xlim()
    assert points == [(left, 1.0), (right, 1.0)]
    assert dash(line)


def test_looks_tell_ours_the_best_three_the_others_and_ablations() -> None:
    looks = {name: line for name, _, line in curves(draw(field()))}
    assert set(looks) == {FULL, OURS, *PUBLIC, "ablation<b>", "ablation a"}
    assert to_hex(looks[OURS].get_color()) == OURS_COLOUR == "#d55e00"
    assert looks[OURS].get_linewidth() > max(
        look.get_linewidth() for name, look in looks.items() if name != OURS
    )
    assert tuple(looks[f"public{n:02}"].get_color() for n in range(3)) == COLOURED
    for name in sorted(PUBLIC)[3:]:
        assert (looks[name].get_color(), looks[name].get_linewidth()) == (OTHER_COLOUR, 1)
    dashed = {name for name, look in looks.items() if dash(look)}
    assert dashed == {FULL, "ablation<b>", "ablation a"}
    assert dash(looks["ablation<b>"]) != dash(looks["ablation a"])


def test_ours_is_drawn_over_the_others() -> None:
    names = [name for name, _, _ in curves(draw(field()))]
    assert names[len(names) // 2] == OURS
    assert names[-1] == OURS


def test_a_row_of_panels_per_regime() -> None:
    figure = draw([*field(), *field("after")])
    assert [name for name, _, _ in curves(figure)].count(OURS) == 4
    heights = [axes.bbox.y0 for axes in figure.axes]
    assert heights[0] == heights[1] > heights[2] == heights[3]
    titles = [axes.get_title(loc="left") for axes in figure.axes[::2]]
    assert titles == [
        "inside: question in the compressed prompt\nscore, share of the full cache's",
        "after: context compressed first, question after it\nscore, share of the full cache's",
    ]
    ours = [points for name, points, _ in curves(figure) if name == OURS]
    assert ours[:2] == ours[2:]


def test_texts_do_not_overlap_and_stay_inside() -> None:
    figure = draw([*field(), *field("after"), *field("later")])
    check_texts_stay_apart_and_inside(figure)
    assert legend(figure) == [OURS, FULL, *sorted(PUBLIC), "ablation a", "ablation<b>"]


def test_every_point_is_inside_its_panel() -> None:
    odd = [at("public00", 0.003, 0.0, 1e-5), at("public01", 1.2, 1.3, 30.0)]
    figure = draw([*field(), *odd])
    for axes in figure.axes:
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        for line in axes.lines:
            assert all(left <= x <= right and low < y < high for x, y in line.get_xydata())
    assert "0.2%" in labels(figure.axes[0].xaxis)


def test_what_has_no_place_is_left_out() -> None:
    """No KL of zero on a logarithmic axis, no score where nothing was scored, nothing infinite."""
    rows = [full(score_share=1.0), at(OURS, 1.0, 1.0, 0.0), at(OURS, 0.1, 0.9, 0.01),
            replace(at("public00", 0.1, 0.5, 0.5), score_share=None),
            at("public01", 0.1, 0.5, math.nan), at("public02", 0.1, 0.5, math.inf)]  # fmt: skip
    drawn = [(name, len(points)) for name, points, _ in curves(draw(rows))]
    assert drawn == [(FULL, 2), ("public02", 1), ("public01", 1), (OURS, 2), ("public00", 1),
                     (OURS, 1)]  # fmt: skip


def test_one_point_at_the_full_cache_has_an_axis_around_it() -> None:
    figure = draw([full(score_share=1.0), at(OURS, 1.0, 1.0, 0.1)])
    (_, level, _), (_, score, _), (_, kl, _) = curves(figure)
    assert score == [(1.0, level[0][1])]
    assert kl == [(1.0, 0.1)]
    for axes, value in zip(figure.axes, (1.0, 0.1), strict=True):
        low, high = axes.get_ylim()
        assert low < value < high
        assert len(labels(axes.yaxis)) >= 2


def test_the_heading_says_model_dtype_tasks_and_questions() -> None:
    texts = svg_texts(plot(field()))
    assert "org/<model>, bfloat16: quality over K/V bytes kept, 1,234 questions" in texts
    assert "tasks: ocr & more, needle" in texts
    assert "inside: question in the compressed prompt" in texts
    many = quality_plot(field(), PUBLIC, "m", [f"task number {n}" for n in range(30)], 9, "x")
    assert "task number 29" in " ".join(svg_texts(many))


def test_names_are_taken_as_they_are() -> None:
    """No mathematics between dollars, no control characters."""
    svg = quality_plot(field(), PUBLIC, "a$\\alpha$\x1b", ["$x$"], 9, "x")
    assert "a$\\alpha$?, x: quality over K/V bytes kept, 9 questions" in svg_texts(svg)


def test_it_is_the_same_in_whatever_order_methods_come() -> None:
    rows = field()
    assert plot(rows) == plot(rows[::-1])
