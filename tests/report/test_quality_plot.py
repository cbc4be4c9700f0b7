"""The picture is sound XML, and its points lie where the values say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from hkvprof.evaluate.records import FULL, OURS
from hkvprof.evaluate.statistics import Interval, MethodSummary
from hkvprof.report.quality_plot import COLOURED, OTHER_COLOUR, OURS_COLOUR, quality_plot
from hkvprof.report.svg import PANEL_HEIGHT, PANEL_WIDTH
from tests.report.test_comparison import full, summary

NAMESPACE = "{http://www.w3.org/2000/svg}"
PUBLIC = {f"public{n:02}" for n in range(20)}


def at(method: str, share: float, score: float, kl: float, regime: str = "inside") -> MethodSummary:
    return summary(
        method, str(share), regime=regime, share=share, score=score, score_share=score,
        difference=Interval(score - 1, score - 1, score - 1, 4), kl=Interval(kl, kl, kl, 4),
    )  # fmt: skip


def field(regime: str = "inside") -> list[MethodSummary]:
    """Full, ours, 20 public baselines (00 is the best) and two ablations at three budgets."""
    rows = [full(regime=regime, score_share=1.0, kl=Interval(0.0, 0.0, 0.0, 4))]
    methods = [OURS, *sorted(PUBLIC), "ablation<b>", "ablation a"]
    for number, method in enumerate(methods):
        for share in (0.2, 0.1, 0.02):
            rows.append(at(method, share, 0.9 - number / 40 + share / 4, 0.01 / share, regime))
    return rows


def plot(rows: list[MethodSummary], public: set[str] = PUBLIC) -> str:
    return quality_plot(rows, public, "org/<model>", ["ocr & more", "needle"], 1234, "bfloat16")


Points = list[tuple[float, float]]


def curves(svg: str) -> Iterator[tuple[str, Points, ElementTree.Element]]:
    """Name, points in px and element of every polyline."""
    for line in ElementTree.fromstring(svg).iter(f"{NAMESPACE}polyline"):
        pairs = (pair.split(",") for pair in line.attrib["points"].split())
        title = line.find(f"{NAMESPACE}title")
        assert title is not None
        yield str(title.text), [(float(x), float(y)) for x, y in pairs], line


def texts(svg: str) -> list[tuple[str, float, float]]:
    """Every text and where it stands."""
    found = ElementTree.fromstring(svg).iter(f"{NAMESPACE}text")
    return [(str(e.text), float(e.attrib["x"]), float(e.attrib["y"])) for e in found]


def ticks(svg: str, left: float) -> dict[float, float]:
    """Labelled values of the first row's vertical axis whose labels end at `left`, and their px."""
    return {
        float(text): y - 4
        for text, x, y in texts(svg)
        if x == pytest.approx(left) and y < 460 and re.fullmatch(r"[0-9.e-]+", text)
    }


def test_points_lie_where_the_values_say() -> None:
    """Read back against the labelled ticks: linear in score, logarithmic in KL and share."""
    values = [(0.02, 0.4, 0.5), (0.1, 0.75, 0.05), (0.5, 1.0, 0.004)]
    svg = plot([full(score_share=1.0), *(at(OURS, *value) for value in values)])
    shares = [(text, x) for text, x, _ in texts(svg) if text.endswith("%")]
    assert [text for text, _ in shares] == ["1%", "2%", "5%", "10%", "20%", "50%", "100%"] * 2
    drawn = [points for name, points, _ in curves(svg) if name == OURS]
    assert len(drawn) == 2
    for number, (points, left, log) in enumerate(zip(drawn, (62, 532), (False, True), strict=True)):
        labels = dict(shares[number * 7 : number * 7 + 7])
        marks = ticks(svg, left)
        low, high = min(marks), max(marks)
        for (x, y), (share, *figures) in zip(points, values, strict=True):
            part = math.log10(share / 0.01) / 2
            assert x == pytest.approx(
                labels["1%"] + part * (labels["100%"] - labels["1%"]), abs=0.02
            )
            part = (figures[number] - low) / (high - low)
            if log:
                part = math.log10(figures[number] / low) / math.log10(high / low)
            assert y == pytest.approx(marks[low] + part * (marks[high] - marks[low]), abs=0.02)
        for tick, y in marks.items():
            part = (
                math.log(tick / low) / math.log(high / low) if log else (tick - low) / (high - low)
            )
            assert y == pytest.approx(marks[low] - part * PANEL_HEIGHT, abs=0.02)


def test_the_full_cache_is_a_dashed_level_at_one() -> None:
    svg = plot(field())
    ((_, points, line),) = (entry for entry in curves(svg) if entry[0] == FULL)
    (left, y), (right, other) = points
    assert y == other == pytest.approx(ticks(svg, 62)[1.0], abs=0.02)
    assert right - left == PANEL_WIDTH
    assert line.attrib["stroke-dasharray"]


def test_looks_tell_ours_the_best_three_the_others_and_ablations() -> None:
    looks = {name: line.attrib for name, _, line in curves(plot(field()))}
    assert set(looks) == {FULL, OURS, *PUBLIC, "ablation<b>", "ablation a"}
    assert looks[OURS]["stroke"] == OURS_COLOUR == "#d55e00"
    assert int(looks[OURS]["stroke-width"]) > max(
        int(look["stroke-width"]) for name, look in looks.items() if name != OURS
    )
    assert tuple(looks[f"public{n:02}"]["stroke"] for n in range(3)) == COLOURED
    for name in sorted(PUBLIC)[3:]:
        assert (looks[name]["stroke"], looks[name]["stroke-width"]) == (OTHER_COLOUR, "1")
    dashed = {name for name, look in looks.items() if "stroke-dasharray" in look}
    assert dashed == {FULL, "ablation<b>", "ablation a"}
    assert looks["ablation<b>"]["stroke-dasharray"] != looks["ablation a"]["stroke-dasharray"]


def test_ours_is_drawn_over_the_others() -> None:
    names = [name for name, _, _ in curves(plot(field()))]
    assert names[len(names) // 2] == OURS
    assert names[-1] == OURS


def test_a_row_of_panels_per_regime() -> None:
    rows = [*field(), *field("after")]
    svg = plot(rows)
    assert [name for name, _, _ in curves(svg)].count(OURS) == 4
    heights = [y for text, _, y in texts(svg) if text.startswith("score, share of")]
    assert len(heights) == 2
    assert heights[1] - heights[0] > PANEL_HEIGHT
    ours = [points for name, points, _ in curves(svg) if name == OURS]
    moved = heights[1] - heights[0]
    for above, below in zip(ours[:2], ours[2:], strict=True):
        assert below == [(x, pytest.approx(y + moved, abs=0.02)) for x, y in above]


def test_texts_do_not_overlap_and_stay_inside() -> None:
    """A letter is taken as 7 px wide, a line as 12 px high."""
    svg = plot([*field(), *field("after"), *field("later")])
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = []
    for element in root.iter(f"{NAMESPACE}text"):
        long = 7 * len(str(element.text))
        part = {"start": 0.0, "middle": 0.5, "end": 1.0}[element.attrib["text-anchor"]]
        x, y = float(element.attrib["x"]) - part * long, float(element.attrib["y"])
        boxes.append((x, y - 9, x + long, y + 3))
        assert x >= 0, element.text
        assert x + long <= width, element.text
        assert 9 <= y <= height - 3, element.text
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            across = min(one[2], other[2]) - max(one[0], other[0])
            down = min(one[3], other[3]) - max(one[1], other[1])
            assert across <= 0 or down <= 0, (one, other)
    legend = [text for text, x, _ in texts(svg) if x > 70 + 2 * PANEL_WIDTH + 90]
    assert [t for t in legend if not t.endswith("%")] == [
        OURS, FULL, *sorted(PUBLIC), "ablation a", "ablation<b>"]  # fmt: skip


def test_every_point_is_inside_its_panel() -> None:
    odd = [at("public00", 0.003, 0.0, 1e-5), at("public01", 1.2, 1.3, 30.0)]
    svg = plot([*field(), *odd])
    for number, (_, points, _) in enumerate(curves(svg)):
        left = 70 if number < 24 else 540
        assert all(left <= x <= left + PANEL_WIDTH + 0.01 for x, _ in points)
    ys = [y for _, points, _ in curves(svg) for _, y in points]
    assert max(ys) - min(ys) <= PANEL_HEIGHT + 0.01
    assert "0.2%" in [text for text, _, _ in texts(svg)]


def test_what_has_no_place_is_left_out() -> None:
    """No KL of zero on a logarithmic axis, no score where nothing was scored, nothing infinite."""
    rows = [full(score_share=1.0), at(OURS, 1.0, 1.0, 0.0), at(OURS, 0.1, 0.9, 0.01),
            replace(at("public00", 0.1, 0.5, 0.5), score_share=None),
            at("public01", 0.1, 0.5, math.nan), at("public02", 0.1, 0.5, math.inf)]  # fmt: skip
    found = [(name, len(points)) for name, points, _ in curves(plot(rows))]
    assert found == [(FULL, 2), ("public02", 1), ("public01", 1), (OURS, 2), ("public00", 1),
                     (OURS, 1)]  # fmt: skip


def test_one_point_at_the_full_cache_has_an_axis_around_it() -> None:
    svg = plot([full(score_share=1.0), at(OURS, 1.0, 1.0, 0.1)])
    (_, level, _), (_, [(x, y)], _), (_, [(_, kl)], _) = curves(svg)
    assert (x, y) == (70 + PANEL_WIDTH, level[0][1])
    marks = ticks(svg, 532)
    assert kl == pytest.approx(marks[0.1], abs=0.02)
    assert len(marks) == len(ticks(svg, 62)) == 2


def test_the_heading_says_model_dtype_tasks_and_questions() -> None:
    svg = plot(field())
    first, second, third, *_ = (text for text, _, _ in texts(svg))
    assert first == "org/<model>, bfloat16: quality over K/V bytes kept, 1,234 questions"
    assert second == "tasks: ocr & more, needle"
    assert third == "inside: question in the compressed prompt"
    many = quality_plot(field(), PUBLIC, "m", [f"task number {n}" for n in range(30)], 9, "x")
    assert "task number 29" in " ".join(text for text, _, _ in texts(many))


def test_it_is_the_same_in_whatever_order_methods_come() -> None:
    rows = field()
    assert plot(rows) == plot(rows[::-1])
