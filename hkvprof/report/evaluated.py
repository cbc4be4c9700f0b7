"""The section of the report on an evaluation: figures with intervals, and answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hkvprof.evaluate.journal import read_answers
from hkvprof.evaluate.records import OURS, REGIMES, Answer
from hkvprof.evaluate.shown import ShownSample, read_shown
from hkvprof.evaluate.statistics import BootstrapInterval, MethodSummary, summarise
from hkvprof.report.comparison import order
from hkvprof.report.page import escape

MOST_QUESTIONS = 6
"""Questions whose answers are shown, of different tasks where there are several."""
_HEADINGS = ("method", "budget", "bytes kept", "reads", "score", "score less full's, points",
             "KL to full, nats")  # fmt: skip


def evaluated(folder: Path) -> str:
    """The section of what `hkvprof eval -o` wrote into a folder. Raises UsageError."""
    answers, samples = read_answers(folder), read_shown(folder)
    summaries = summarise(answers)
    regimes = dict.fromkeys(one.regime for one in summaries)
    tables = [_table(regime, [s for s in summaries if s.regime == regime]) for regime in regimes]
    known = [one for one in answers if one.sample in samples] or answers
    shown = [_question(group, samples.get(group[0].sample)) for group in _examples(known)]
    return (
        "<h2>Evaluation</h2><p class='dim'>Square brackets are 95% bootstrap intervals over "
        f"samples.</p>{''.join(tables)}<h2>Answers side by side</h2>{''.join(shown)}"
    )


def _table(regime: str, summaries: Sequence[MethodSummary]) -> str:
    head = "".join(f"<th>{name}</th>" for name in _HEADINGS)
    rows = "".join(_row(one) for one in order(summaries))
    title = escape(f"{regime}: {REGIMES.get(regime, '')}")
    return f"<h3>{title}</h3><div class='scroll'><table><tr>{head}</tr>{rows}</table></div>"


def _row(one: MethodSummary) -> str:
    score = "-" if one.score is None else f"{one.score:.1%}"
    figures = (
        f"{one.share:.1%}",
        f"{one.read_share:.2%}",
        score,
        _span(one.difference, 100, ".1f"),
        _span(one.kl, 1, ".2g"),
    )
    cells = "".join(f"<td class='number'>{cell}</td>" for cell in figures)
    name = f"<b>{OURS}</b>" if one.method == OURS else escape(one.method)
    return f"<tr><td>{name}</td><td>{escape(one.budget or '-')}</td>{cells}</tr>"


def _span(found: BootstrapInterval | None, scale: float, form: str) -> str:
    if found is None:
        return "-"
    value, low, high = (format(scale * x, form) for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def _examples(answers: Sequence[Answer]) -> list[list[Answer]]:
    """All methods' answers to MOST_QUESTIONS questions: one of every task first."""
    groups: dict[tuple[str, str, int], list[Answer]] = {}
    for one in answers:
        groups.setdefault((one.sample, one.regime, one.turn), []).append(one)
    seen: dict[str, int] = {}
    ranked = []
    for group in groups.values():
        task = group[0].task
        seen[task] = seen.get(task, 0) + 1
        ranked.append((seen[task], group))
    return [group for _, group in sorted(ranked, key=lambda entry: entry[0])[:MOST_QUESTIONS]]


def _question(group: Sequence[Answer], sample: ShownSample | None) -> str:
    first = group[0]
    asked, pictures = "", ""
    if sample is not None:
        pictures = "".join(
            f"<img alt='' src='data:image/jpeg;base64,{one}'>" for one in sample.pictures
        )
        asked = escape("".join(sample.questions[first.turn : first.turn + 1]))
    rows = "".join(
        f"<tr><td>{escape(one.method)}</td><td>{escape(one.budget or '-')}</td>"
        f"<td>{escape(one.text)}</td>"
        f"<td class='number'>{'-' if one.score is None else f'{one.score:.2g}'}</td></tr>"
        for one in group
    )
    return (
        f"<div class='question'><b>{escape(first.task)}</b>, {escape(first.sample)}, "
        f"{escape(first.regime)}; expected: {escape(first.expected or '-')}"
        f"<p>{asked}</p><div class='pictures'>{pictures}</div><div class='scroll'>"
        "<table><tr><th>method</th><th>budget</th><th>answer</th><th>score</th></tr>"
        f"{rows}</table></div></div>"
    )
