"""The picture is sound XML, tells every figure, and is the same for the same result."""

from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from hkvprof.report.plot import COLOURS, DASHES, bench_plot
from hkvprof.report.svg import round_step
from tests.bench.results import make_result

NAMESPACE = "{http://www.w3.org/2000/svg}"


def lines(svg: str) -> Iterator[tuple[str, list[tuple[float, float]], ElementTree.Element]]:
    """Name, points and element of every polyline."""
    for line in ElementTree.fromstring(svg).iter(f"{NAMESPACE}polyline"):
        pairs = (pair.split(",") for pair in line.attrib["points"].split())
        title = line.find(f"{NAMESPACE}title")
        assert title is not None
        yield str(title.text), [(float(x), float(y)) for x, y in pairs], line


def test_one_line_per_method_and_panel_over_all_contexts() -> None:
    result = make_result()
    drawn = list(lines(bench_plot(result)))
    ran = [name for name in result.methods if name != "static only, 0.05"]
    assert [name for name, _, _ in drawn] == ran * 2
    for name, points, _ in drawn:
        assert len(points) == (3 if name == "dynamic only, 0.1" else 4), name
        xs = [x for x, _ in points]
        assert xs == sorted(set(xs))


def test_more_bytes_stand_higher() -> None:
    drawn = list(lines(bench_plot(make_result())))[: len(make_result().methods) - 1]
    last = {name: points[-1][1] for name, points, _ in drawn}
    order = ("dense, preallocated", "dense", "profile, 0.2", "profile, 0.1", "profile, 0.05")
    heights = [last[name] for name in order]
    assert heights == sorted(heights)
    for _, points, _ in drawn:
        ys = [y for _, y in points]
        assert ys == sorted(ys, reverse=True)


def test_everything_is_inside_the_picture() -> None:
    svg = bench_plot(make_result())
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter():
        for name, value in element.attrib.items():
            if name in ("x", "x1", "x2", "cx"):
                assert 0 <= float(value) <= width
            if name in ("y", "y1", "y2", "cy"):
                assert 0 <= float(value) <= height
    for _, points, _ in lines(svg):
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_methods_differ_in_colour_or_dashes() -> None:
    looks = {
        name: (line.attrib["stroke"], line.attrib.get("stroke-dasharray", ""))
        for name, _, line in lines(bench_plot(make_result()))
    }
    assert len(set(looks.values())) == len(looks)
    assert looks["profile, 0.1"] == (COLOURS["profile"], DASHES[1])


def test_text_names_axes_methods_and_regime() -> None:
    root = ElementTree.fromstring(bench_plot(make_result()))
    texts = [str(element.text) for element in root.iter(f"{NAMESPACE}text")]
    assert texts.count("context, tokens") == 2
    assert {"1,024", "8,192", "dense", "profile, 0.05"} <= set(texts)
    assert "a <model> & more, batch 1, bfloat16: dense and compressed KV cache" in texts
    assert texts[-2:] == [
        "cpu (some), 2 threads, kernels: none",
        "torch 2.13.0, transformers 5.23.0",
    ]


def test_it_is_deterministic_and_takes_one_context() -> None:
    assert bench_plot(make_result()) == bench_plot(make_result())
    single = list(lines(bench_plot(make_result((2048,)))))
    assert {len(points) for _, points, _ in single} == {1}
    assert len({points[0][0] for _, points, _ in single}) == 2


@pytest.mark.parametrize(
    ("least", "step"), [(0.9, 1), (1.0, 1), (1.1, 2), (2.2, 2.5), (30, 50), (0.0007, 0.001)]
)
def test_steps_of_the_axis_are_round(least: float, step: float) -> None:
    assert round_step(least) == pytest.approx(step)
