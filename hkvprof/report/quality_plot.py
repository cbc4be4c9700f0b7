"""A comparison as a picture: score and KL over the share of K/V bytes kept, a row per regime."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from hkvprof.evaluate.records import FULL, OURS, REGIMES
from hkvprof.evaluate.statistics import MethodSummary, ranking
from hkvprof.report import svg
from hkvprof.report.svg import LEGEND_LINE, PANEL_HEIGHT, PANEL_WIDTH, Frame, Line

COLOURED = ("#0072b2", "#009e73", "#e69f00")
"""The best public baselines, best first (Okabe and Ito's palette)."""
OURS_COLOUR, FULL_COLOUR = "#d55e00", "#000000"
OTHER_COLOUR, ABLATION_COLOUR = "#b0b0b0", "#cc79a7"
FULL_DASH = "6 4"
ABLATION_DASHES = ("1 3", "2 5", "1 3 4 3", "1 6")
KL_FLOOR = 1e-6
"""Nats below which a KL is rounding (and has no place on a logarithmic axis)."""
_LEFT, _GAP, _ROW = 70, 90, 100
_LETTER = 7
"""Generous width of a letter at font size 11, in px."""


@dataclass(frozen=True)
class Scale:
    """A vertical or horizontal axis from `low` to `high`, and where its ticks are."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = True

    def part(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return (at - low) / (high - low)


def quality_plot(
    summaries: Sequence[MethodSummary],
    public: Collection[str],
    model: str,
    tasks: Sequence[str],
    questions: int,
    dtype: str,
) -> str:
    """The SVG text: the same for the same summaries, in whatever order of methods.

    `public` names the baselines that are peers; other methods are drawn as ablations.
    """
    looks = _looks(summaries, public)
    names = [look.name for look in looks]
    heading = f"{model}, {dtype}: quality over K/V bytes kept, {questions:,} questions"
    lines = textwrap.wrap(f"tasks: {', '.join(tasks)}", 140)
    top = 50 + 15 * len(lines)
    side = _LEFT + 2 * PANEL_WIDTH + _GAP + 24
    regimes = list(dict.fromkeys(s.regime for s in summaries))
    rows = [
        _row(
            [s for s in summaries if s.regime == regime],
            looks,
            top + 36 + number * (PANEL_HEIGHT + _ROW),
        )
        for number, regime in enumerate(regimes)
    ]
    width = max(side + 62 + _LETTER * max(map(len, names), default=0), _LEFT + 10 * len(heading))
    height = top + 36 + max(
        len(regimes) * (PANEL_HEIGHT + _ROW), LEGEND_LINE * (len(names) + 1)
    )  # fmt: skip
    body = [
        svg.text(_LEFT, 22, heading, size=14),
        *(svg.text(_LEFT, 42 + 15 * number, line) for number, line in enumerate(lines)),
        *(part for row in rows for part in row),
        *svg.legend(looks, side, top + 36),
    ]
    return svg.document(width, height, heading, body)


def _looks(summaries: Sequence[MethodSummary], public: Collection[str]) -> list[Line]:
    """The legend: hkvprof, full, public baselines from the best on, ablations by name."""
    present = {s.method for s in summaries}
    ranked = ranking(summaries, public)
    ablations = sorted(present - {OURS, FULL, *ranked})
    looks = [Line(OURS, OURS_COLOUR, "", (), width=4, radius=4)]
    looks.append(Line(FULL, FULL_COLOUR, FULL_DASH, (), radius=0))
    for name, colour in zip(ranked, COLOURED, strict=False):
        looks.append(Line(name, colour, "", ()))
    for name in ranked[len(COLOURED) :]:
        looks.append(Line(name, OTHER_COLOUR, "", (), width=1, radius=2))
    for number, name in enumerate(ablations):
        dash = ABLATION_DASHES[number % len(ABLATION_DASHES)]
        looks.append(Line(name, ABLATION_COLOUR, dash, (), radius=2))
    return [look for look in looks if look.name in present]


def _row(rows: Sequence[MethodSummary], looks: Sequence[Line], top: float) -> list[str]:
    """One regime: its score panel and its KL panel."""
    regime = rows[0].regime
    x = _share_scale([s.share for s in rows if s.share > 0])
    scores = _lines(rows, looks, lambda s: s.score_share)
    kls = _lines(rows, looks, lambda s: s.kl.value if s.kl.value >= KL_FLOOR else None)
    score, kl = Frame(_LEFT, top), Frame(_LEFT + PANEL_WIDTH + _GAP, top)
    whole = Line(FULL, FULL_COLOUR, FULL_DASH, ((x.low, 1.0), (x.high, 1.0)), radius=0)
    return [
        svg.text(_LEFT, top - 30, f"{regime}: {REGIMES.get(regime, regime)}", size=13),
        *_panel(
            score, "score, share of the full cache's", x, _score_scale(scores), [whole, *scores]
        ),
        *_panel(
            kl, f"KL(full || method), nats per token, from {KL_FLOOR:g} on", x, _kl_scale(kls), kls
        ),
    ]


def _lines(
    rows: Sequence[MethodSummary],
    looks: Sequence[Line],
    value: Callable[[MethodSummary], float | None],
) -> list[Line]:
    """One line per method, ours last and so on top; points (share, value) by share."""
    lines = []
    for look in reversed(looks):
        points = [
            (row.share, found)
            for row in rows
            if row.method == look.name != FULL
            and row.share > 0
            and (found := value(row)) is not None
            and math.isfinite(found)
        ]
        if points:
            lines.append(replace(look, points=tuple(sorted(points))))
    return lines


def _panel(frame: Frame, title: str, x: Scale, y: Scale, lines: Sequence[Line]) -> list[str]:
    def place(point: tuple[float, float]) -> tuple[float, float]:
        across, up = x.part(point[0]), y.part(point[1])
        return frame.left + across * PANEL_WIDTH, frame.bottom - up * PANEL_HEIGHT

    parts = svg.axes(
        frame,
        title,
        "K/V bytes kept, share of dense, indexes included",
        [(place((tick, y.low))[0], f"{100 * tick:g}%") for tick in x.ticks],
        [(place((x.low, tick))[1], f"{tick:g}") for tick in y.ticks],
    )
    for line in lines:
        parts += svg.curve(line, [place(point) for point in line.points])
    return parts


def _share_scale(shares: Sequence[float]) -> Scale:
    """From 1% (or less, where a share is less) to 100% (or the greatest share)."""
    ticks = [step for step in _steps(min(0.01, *shares), 1.0) if step <= 1.0]
    return Scale(ticks[0], max(1.0, *shares), tuple(ticks))


def _score_scale(lines: Sequence[Line]) -> Scale:
    """Round values around all points and the full cache's level."""
    values = [1.0, *(value for line in lines for _, value in line.points)]
    step = svg.round_step(max(max(values) - min(values), 0.05) / 5)
    first, last = (math.floor(min(values) / step + 1e-9), math.ceil(max(values) / step - 1e-9))
    first -= first == last
    ticks = tuple(step * number for number in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks, logarithmic=False)


def _kl_scale(lines: Sequence[Line]) -> Scale:
    """Round values around all points; only powers of ten from two decades on."""
    values = [value for line in lines for _, value in line.points] or [0.1]
    steps = _steps(min(values), max(values))
    tens = [step for step in steps if math.log10(step).is_integer()]
    return Scale(steps[0], steps[-1], tuple(tens if len(tens) > 2 else steps))


def _steps(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, at least two, from at most `low` to at least `high`."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [float(f"{factor}e{power}") for power in decades for factor in (1, 2, 5)]
    first = max(number for number, step in enumerate(steps) if step <= low)
    last = min(number for number, step in enumerate(steps) if step >= high)
    return steps[first : max(last, first + 1) + 1]
