"""The picture is sound XML, tells every figure, and is the same for the same result."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure

from hkvprof.report.plot import BENCH_COLOURS, BUDGET_DASHES, bench_figure, bench_plot
from tests.bench.results import make_result
from tests.report.drawn import (
    check_texts_stay_apart_and_inside,
    curves,
    dash,
    legend,
    styled,
    svg_texts,
)


def figure(contexts: tuple[int, ...] | None = None) -> Figure:
    return styled(bench_figure, make_result() if contexts is None else make_result(contexts))


def test_one_line_per_method_and_panel_over_all_contexts() -> None:
    result = make_result()
    drawn = list(curves(figure()))
    ran = [name for name in result.methods if name != "static only, 0.05"]
    assert [name for name, _, _ in drawn] == ran * 2
    assert legend(figure()) == ran
    for name, points, _ in drawn:
        assert len(points) == (3 if name == "dynamic only, 0.1" else 4), name
        xs = [x for x, _ in points]
        assert xs == sorted(set(xs))
        assert set(xs) <= {context.tokens for context in result.contexts}


def test_points_are_the_figures_of_the_result() -> None:
    result = make_result()
    drawn = list(curves(figure()))
    for number, (name, points, _) in enumerate(drawn):
        for tokens, value in points:
            (context,) = (c for c in result.contexts if c.tokens == tokens)
            row = context.row(name)
            assert value == (row.resident_bytes / 2**20 if number < len(drawn) / 2 else row.step_ms)


def test_axes_start_at_zero_and_hold_every_point() -> None:
    for axes in figure().axes:
        low, high = axes.get_ylim()
        left, right = axes.get_xlim()
        assert low == 0
        for line in axes.lines:
            assert all(left < x < right and 0 <= y < high for x, y in line.get_xydata())


def test_everything_is_inside_the_picture() -> None:
    check_texts_stay_apart_and_inside(figure())


def test_methods_differ_in_colour_or_dashes() -> None:
    looks = {name: (line.get_color(), dash(line)) for name, _, line in curves(figure())}
    assert len(set(looks.values())) == len(looks)
    assert looks["profile, 0.1"] == (BENCH_COLOURS["profile"], BUDGET_DASHES[1])


def test_text_names_axes_methods_and_regime() -> None:
    texts = svg_texts(bench_plot(make_result()))
    assert texts.count("context, tokens") == 2
    assert {"1,024", "8,192", "dense", "profile, 0.05"} <= set(texts)
    assert "a <model> & more, batch 1, bfloat16: dense and compressed KV cache" in texts
    assert "cpu (some), 2 threads, kernels: none" in texts
    assert "torch 2.13.0, transformers 5.23.0" in texts


def test_it_is_deterministic_whatever_the_users_settings_are() -> None:
    plain = bench_plot(make_result())
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "lines.linewidth": 9}):
        assert bench_plot(make_result()) == plain
        assert matplotlib.rcParams["font.size"] == 30
    assert "<dc:date>" not in plain


def test_it_takes_one_context() -> None:
    single = list(curves(figure((2048,))))
    assert {tuple(x for x, _ in points) for _, points, _ in single} == {(2048.0,)}
    assert len({name for name, _, _ in single}) > 2
