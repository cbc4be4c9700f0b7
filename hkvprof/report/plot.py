"""Plots as SVG, drawn by matplotlib (the extra `report`): a benchmark, and a comparison.

The same figures give the same bytes, whatever a user's matplotlibrc says; pyplot, whose state is
global, is not used. Every function raises UsageError where matplotlib is not installed.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hkvprof.bench.records import BenchResult, Row
from hkvprof.evaluate.records import FULL, OURS, REGIMES
from hkvprof.evaluate.statistics import MethodSummary, ranking
from hkvprof.lazy import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Dash = tuple[float, ...]
"""Strokes and gaps in px; () for a whole line."""

BENCH_COLOURS = {
    "dense": "#000000",
    "preallocated": "#7f7f7f",
    "static": "#0072b2",
    "dynamic": "#e69f00",
    "profile": "#d55e00",
}
"""By kind of method; from the palette of Okabe and Ito, told apart by the colour-blind."""
PREALLOCATED_DASH: Dash = (1, 3)
BUDGET_DASHES: tuple[Dash, ...] = ((), (8, 4), (2, 3), (8, 3, 2, 3), (14, 5), (4, 2, 1, 2, 1, 2))
"""By budget, in the order of the budgets."""

COLOURED = ("#0072b2", "#009e73", "#e69f00")
"""The best public baselines, best first (Okabe and Ito's palette)."""
OURS_COLOUR, FULL_COLOUR = "#d55e00", "#000000"
OTHER_COLOUR, ABLATION_COLOUR = "#b0b0b0", "#cc79a7"
FULL_DASH: Dash = (6, 4)
ABLATION_DASHES: tuple[Dash, ...] = ((1, 3), (2, 5), (1, 3, 4, 3), (1, 6))
KL_FLOOR = 1e-6
"""Nats below which a KL is rounding (and has no place on a logarithmic axis)."""

_PANEL_WIDTH, _PANEL_HEIGHT, _LEGEND_LINE, _LETTER = 6.2, 4.6, 0.26, 0.1
"""Room for a panel with its labels, a line of the legend, and a letter of it, in inches."""
_MOST_X_LABELS = 8
_STYLE = {
    "figure.dpi": 72,  # one px of the SVG is one point
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "legend.handlelength": 4,
    "lines.scale_dashes": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "hkvprof",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn; the line's width and the marks' size in px (0: no marks)."""

    name: str
    colour: str
    dash: Dash = ()
    width: float = 2
    marker: float = 6

    def style(self) -> dict[str, Any]:
        """As matplotlib's Line2D takes it."""
        return {
            "label": self.name,
            "color": self.colour,
            "linewidth": self.width,
            "linestyle": (0, self.dash) if self.dash else "solid",
            "marker": "o" if self.marker else "none",
            "markersize": self.marker,
        }


def bench_plot(result: BenchResult) -> str:
    """Bytes after the prompt and time per token over the context's length, as SVG text."""
    with own_style():
        return _svg(bench_figure(result))


def quality_plot(
    summaries: Sequence[MethodSummary],
    public: Collection[str],
    model: str,
    tasks: Sequence[str],
    questions: int,
    dtype: str,
) -> str:
    """Score and KL over the share of K/V bytes kept, a row of panels per regime, as SVG text.

    It is the same for the same summaries, in whatever order of methods. `public` names the
    baselines that are peers; other methods are drawn as ablations.
    """
    heading = f"{model}, {dtype}: quality over K/V bytes kept, {questions:,} questions"
    with own_style():
        return _svg(quality_figure(summaries, public, heading, tasks))


# -- a benchmark ----------------------------------------------------------------------------------


def bench_figure(result: BenchResult) -> Figure:
    """The picture of `bench_plot`."""
    regime = result.regime
    looks = _bench_looks(result)
    figure = _figure(1, [look.name for look in looks])
    heading = f"{regime.model}, batch {regime.batch}, {regime.dtype}: dense and compressed KV cache"
    figure.suptitle(_printable(heading), x=0.01, ha="left")
    versions = ", ".join(f"{name} {version}" for name, version in regime.versions.items())
    footer = f"{regime.device}, {regime.threads} threads, kernels: {regime.kernels}\n{versions}"
    figure.supxlabel(_printable(footer), x=0.01, ha="left", size=10)
    memory, time = figure.axes
    _bench_panel(memory, result, looks, "Resident K/V after the prompt, MiB", _resident_mib)
    _bench_panel(time, result, looks, "Decoding, ms per token", lambda row: row.step_ms)
    _legend(figure, [look for look in looks if look.name in _drawn(memory)])
    return figure


def _resident_mib(row: Row) -> float | None:
    return None if row.resident_bytes is None else row.resident_bytes / 2**20


def _bench_looks(result: BenchResult) -> list[Look]:
    """One look per method: its colour by kind, its dashes by budget."""
    kinds = {row.method: row for context in result.contexts for row in context.rows}
    budgets = list(dict.fromkeys(row.budget for row in kinds.values() if row.budget))
    looks = []
    for name in result.methods:
        row = kinds[name]
        dash: Dash = PREALLOCATED_DASH if row.kind == "preallocated" else ()
        if row.budget:
            dash = BUDGET_DASHES[budgets.index(row.budget) % len(BUDGET_DASHES)]
        looks.append(Look(name, BENCH_COLOURS[row.kind], dash))
    return looks


def _bench_panel(
    axes: Axes,
    result: BenchResult,
    looks: Sequence[Look],
    title: str,
    value: Callable[[Row], float | None],
) -> None:
    """One line per method; the horizontal axis is logarithmic, the vertical one starts at zero."""
    contexts = [context.tokens for context in result.contexts]
    axes.set_title(title)
    axes.set_xlabel("context, tokens")
    axes.set_xscale("log", base=2)
    for look in looks:
        points = []
        for context in result.contexts:
            row = context.row(look.name)
            figure = None if row is None else value(row)
            if figure is not None:
                points.append((context.tokens, figure))
        _curve(axes, look, points)
    every = math.ceil(len(contexts) / _MOST_X_LABELS)
    labels = ["" if n % every else f"{tokens:,}" for n, tokens in enumerate(contexts)]
    axes.set_xticks(contexts, labels)
    axes.minorticks_off()
    if len(contexts) == 1:
        axes.set_xlim(contexts[0] / 2, contexts[0] * 2)
    axes.set_ylim(bottom=0)


# -- a comparison ---------------------------------------------------------------------------------


def quality_figure(
    summaries: Sequence[MethodSummary],
    public: Collection[str],
    heading: str,
    tasks: Sequence[str],
) -> Figure:
    """The picture of `quality_plot`."""
    looks = _quality_looks(summaries, public)
    regimes = list(dict.fromkeys(s.regime for s in summaries))
    figure = _figure(len(regimes), [look.name for look in looks])
    told = textwrap.wrap(_printable(f"tasks: {', '.join(tasks)}"), 120)
    figure.suptitle("\n".join([_printable(heading), *told]), x=0.01, ha="left")
    for number, regime in enumerate(regimes):
        rows = [s for s in summaries if s.regime == regime]
        _score_panel(figure.axes[2 * number], rows, looks)
        _kl_panel(figure.axes[2 * number + 1], rows, looks)
    _legend(figure, looks)
    return figure


def _quality_looks(summaries: Sequence[MethodSummary], public: Collection[str]) -> list[Look]:
    """The legend: hkvprof, full, public baselines from the best on, ablations by name."""
    present = {s.method for s in summaries}
    ranked = ranking(summaries, public)
    ablations = sorted(present - {OURS, FULL, *ranked})
    looks = [Look(OURS, OURS_COLOUR, width=4, marker=8), Look(FULL, FULL_COLOUR, FULL_DASH, 2, 0)]
    looks += [Look(name, colour) for name, colour in zip(ranked, COLOURED, strict=False)]
    looks += [Look(name, OTHER_COLOUR, (), 1, 4) for name in ranked[len(COLOURED) :]]
    for number, name in enumerate(ablations):
        dash = ABLATION_DASHES[number % len(ABLATION_DASHES)]
        looks.append(Look(name, ABLATION_COLOUR, dash, marker=4))
    return [look for look in looks if look.name in present]


def _score_panel(axes: Axes, rows: Sequence[MethodSummary], looks: Sequence[Look]) -> None:
    regime = rows[0].regime
    told = f"{regime}: {REGIMES.get(regime, regime)}"
    axes.set_title(f"{_printable(told)}\nscore, share of the full cache's")
    _share_axis(axes, rows)
    full = next((look for look in looks if look.name == FULL), Look(FULL, FULL_COLOUR, FULL_DASH))
    _curve(axes, full, [(share, 1.0) for share in axes.get_xlim()])
    _quality_curves(axes, rows, looks, lambda row: row.score_share)
    if axes.dataLim.height < 0.05:  # equal scores: room around the full cache's level
        axes.set_ylim(axes.dataLim.y0 - 0.04, axes.dataLim.y1 + 0.01)


def _kl_panel(axes: Axes, rows: Sequence[MethodSummary], looks: Sequence[Look]) -> None:
    axes.set_title(f"KL(full || method), nats per token, from {KL_FLOOR:g} on")
    _share_axis(axes, rows)
    axes.set_yscale("log")
    values = _quality_curves(
        axes, rows, looks, lambda r: r.kl.value if r.kl.value >= KL_FLOOR else None
    ) or [0.1]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    axes.set_ylim(0.9 * 10.0**low, 1.1 * 10.0**high)
    _steps(axes.yaxis, (1.0, 2.0, 5.0) if high - low < 3 else (1.0,), lambda value: f"{value:g}")


def _share_axis(axes: Axes, rows: Sequence[MethodSummary]) -> None:
    """From 1% (or less, where a share is less) to 100% (or the greatest share), logarithmic."""
    shares = [s.share for s in rows if s.share > 0]
    low = 10.0 ** math.floor(math.log10(min(0.01, *shares)))
    axes.set_xlabel("K/V bytes kept, share of dense, indexes included")
    axes.set_xscale("log")
    axes.set_xlim(0.9 * low, 1.1 * max(1.0, *shares))
    _steps(axes.xaxis, (1.0, 2.0, 5.0), lambda share: f"{100 * share:g}%")


def _steps(axis: Any, steps: tuple[float, ...], write: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis at these multiples of powers of ten."""
    ticker = require_extra("matplotlib.ticker", "report")
    axis.set_major_locator(ticker.LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: write(value)))
    axis.set_minor_locator(ticker.NullLocator())


def _quality_curves(
    axes: Axes,
    rows: Sequence[MethodSummary],
    looks: Sequence[Look],
    value: Callable[[MethodSummary], float | None],
) -> list[float]:
    """One line per method over its shares, ours last and so on top; returns the values drawn."""
    values: list[float] = []
    for look in reversed(looks):
        points = [
            (row.share, figure)
            for row in rows
            if row.method == look.name != FULL
            and row.share > 0
            and (figure := value(row)) is not None
            and math.isfinite(figure)
        ]
        _curve(axes, look, sorted(points))
        values += [figure for _, figure in points]
    return values


# -- both -----------------------------------------------------------------------------------------


@contextmanager
def own_style() -> Iterator[None]:
    """matplotlib's defaults and ours; the user's settings return afterwards."""
    with require_extra("matplotlib.style", "report").context(["default", _STYLE]):
        yield


def _figure(rows: int, names: Sequence[str]) -> Figure:
    """Two panels per row, and room for the legend right of them."""
    width = 2 * _PANEL_WIDTH + 1 + _LETTER * max(map(len, names), default=0)
    height = max(rows * _PANEL_HEIGHT, _LEGEND_LINE * len(names)) + 1.2
    make = require_extra("matplotlib.figure", "report").Figure
    figure = make(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1, wspace=0.02, hspace=0.05)
    figure.subplots(rows, 2)
    return figure


def _curve(axes: Axes, look: Look, points: Sequence[tuple[float, float]]) -> None:
    """A line with marks at its points, so that a single one is seen too."""
    if points:
        place = axes.get_subplotspec()
        panel = place.num1 if place else 0
        axes.plot(*zip(*points, strict=True), gid=f"curve {panel}: {look.name}", **look.style())


def _drawn(axes: Axes) -> set[str]:
    return {str(line.get_label()) for line in axes.lines}


def _legend(figure: Figure, looks: Sequence[Look]) -> None:
    line = require_extra("matplotlib.lines", "report").Line2D
    figure.legend(
        handles=[line([], [], **look.style()) for look in looks], loc="outside right upper"
    )


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _printable(content: str) -> str:
    """Text fit for XML and for one line each: no control characters."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in content)
