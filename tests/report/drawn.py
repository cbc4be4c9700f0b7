"""What a plot shows, read from matplotlib's figure and from the SVG text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from hkvprof.report import plot

Points = list[tuple[float, float]]


def curves(figure: Figure) -> Iterator[tuple[str, Points, Line2D]]:
    """Name, points (in the units of the axes) and line of every curve, panel by panel."""
    for axes in figure.axes:
        for line in axes.lines:
            yield str(line.get_label()), [(float(x), float(y)) for x, y in line.get_xydata()], line


def dash(line: Line2D) -> tuple[float, ...]:
    """Strokes and gaps in px; () where the line is whole."""
    return tuple(line._dash_pattern[1] or ())  # type: ignore[attr-defined]


def svg_texts(svg: str) -> list[str]:
    """Every text of sound XML."""
    root = ElementTree.fromstring(svg)
    return [str(element.text) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def legend(figure: Figure) -> list[str]:
    """Names in the legend, from the top."""
    (only,) = figure.legends
    return [text.get_text() for text in only.get_texts()]


def styled(make: Callable[..., Figure], *given: Any) -> Figure:
    """A figure laid out in the plots' own style."""
    with plot.own_style():
        figure = make(*given)
        figure.draw_without_rendering()
    return figure


def check_texts_stay_apart_and_inside(figure: Figure) -> None:
    """No text overlaps another or leaves the picture."""
    hidden = _not_shown(figure)
    with plot.own_style():
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in figure.findobj(Text)
            if text.get_visible() and text.get_text() and id(text) not in hidden
        ]
    width, height = figure.bbox.width, figure.bbox.height
    assert boxes
    for number, (said, box) in enumerate(boxes):
        assert box.x0 >= 0, said
        assert box.y0 >= 0, said
        assert box.x1 <= width, said
        assert box.y1 <= height, said
        for other, place in boxes[:number]:
            across = min(box.x1, place.x1) - max(box.x0, place.x0)
            down = min(box.y1, place.y1) - max(box.y0, place.y0)
            assert across <= 0 or down <= 0, (said, other)


def _not_shown(figure: Figure) -> set[int]:
    """Ids of the labels outside their axis: matplotlib keeps them, and does not draw them."""
    hidden = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.majorTicks:
            if not low <= tick.get_loc() <= high:
                hidden |= {id(tick.label1), id(tick.label2)}
    return hidden
