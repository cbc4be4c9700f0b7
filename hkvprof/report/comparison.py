"""The tables of a comparison, its duels in words, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from hkvprof.evaluate.records import FULL, OURS, REGIMES
from hkvprof.evaluate.statistics import BootstrapInterval, Duel, MethodSummary
from hkvprof.profile.budgets import Budget
from hkvprof.report.folding import FoldingTable

NOTES = (
    "share: resident K/V bytes over dense, indexes included; s: seconds to compress",
    "reads: from host memory per decoding step, over dense bytes; at most: what one could read",
    "d score: points to the full cache on the same questions; worst task: its score over full's",
    "all kept: samples none of whose questions scores less than with the full cache",
    "KL(full || method), d NLL (to full): nats per token; agree: same likeliest next token",
    "true: while what really follows a text is forced, not what the full cache would say",
    "KL of full: the noise of its dtype, dense against dense computed another way",
    "[..]: 95% bootstrap interval over samples",
)


@dataclass(frozen=True)
class _Column:
    """A heading, and how a row's figure is written."""

    heading: str
    write: Callable[[MethodSummary], str]


def comparison_table(summaries: Sequence[MethodSummary]) -> Group:
    """One table per regime, then what the columns mean."""
    return Group(*(_regime(rows) for rows in _by_regime(summaries)), *NOTES)


def task_table(summaries: Sequence[MethodSummary]) -> Group:
    """Mean scores by task of the full cache and of hkvprof at every budget, a table per regime."""
    mixed = len({m for s in summaries for task in s.tasks.values() for m in task.metrics}) > 1
    return Group(*(_tasks(rows, mixed) for rows in _by_regime(summaries)))


def duel_lines(duels: Sequence[Duel]) -> list[str]:
    """Every duel as a sentence."""
    return [_sentence(duel) for duel in duels]


def engine_lines(summaries: Sequence[MethodSummary]) -> list[str]:
    """How far an engine is from hkvprof in transformers under its own plan, as sentences."""
    ours = {(s.regime, s.budget): s.kl.value for s in summaries if s.method == OURS}
    return [
        f"{one.regime}, budget {one.budget}: KL({OURS} || {one.method}) "
        f"{_span(one.runtime_kl, _nats)} nats, both under the engine's plan; to the full cache "
        f"{one.method}'s is {_signed(one.kl.value - ours[one.regime, one.budget])} from {OURS}'s"
        for one in summaries
        if one.runtime_kl is not None
    ]


def order(summaries: Sequence[MethodSummary]) -> list[MethodSummary]:
    """Budgets descend (full is the whole); hkvprof, then full, then the others by score."""

    def rank(row: MethodSummary) -> tuple[tuple[float, ...], int, float, str]:
        place = {OURS: 0, FULL: 1}.get(row.method, 2)
        return _size(row.budget), place, -(row.score or 0.0), row.method

    return sorted(summaries, key=rank)


def _size(budget: str) -> tuple[float, ...]:
    """Shares before bytes before tokens, each descending."""
    size = Budget(share=1.0) if not budget else Budget.parse(budget)
    return tuple(-(amount or 0) for amount in (size.share, size.bytes, size.tokens))


def _by_regime(summaries: Sequence[MethodSummary]) -> list[list[MethodSummary]]:
    regimes = dict.fromkeys(s.regime for s in summaries)
    return [order([s for s in summaries if s.regime == regime]) for regime in regimes]


def _title(regime: str) -> str:
    return f"{regime}: {REGIMES[regime]}" if regime in REGIMES else regime


def _regime(rows: Sequence[MethodSummary]) -> Group:
    questions = next(row.answers for row in rows if row.method == FULL)
    samples = next(row.kl.samples for row in rows if row.method == FULL)
    title = f"{_title(rows[0].regime)} ({questions} questions, {samples} samples)"
    headings = [column.heading for column in _COLUMNS]
    table = FoldingTable(
        "method", *headings, keys=2, right=set(headings) - {"budget", "worst task"}, gap=" "
    )
    previous = rows[0].budget
    for row in rows:
        if row.budget != previous:
            table.add_row()
        previous = row.budget
        name = row.method if row.answers == questions else f"{row.method} (n={row.answers})"
        table.add_row(_cell(name), *(_cell(column.write(row)) for column in _COLUMNS))
    return Group(_cell(title), table, "")


def _tasks(rows: Sequence[MethodSummary], mixed: bool) -> Group:
    shown = [row for row in rows if row.method == FULL] + [r for r in rows if r.method == OURS]
    headings = ["full cache" if row.method == FULL else row.budget for row in shown]
    table = FoldingTable("", *headings, right=headings)
    for name, task in shown[0].tasks.items():
        named = "".join(f"{metric}, " for metric in task.metrics if mixed)
        cells = [row.tasks.get(name) for row in shown]
        table.add_row(
            _cell(f"{name} ({named}n={task.answers})"),
            *("-" if cell is None else f"{cell.score:.0%}" for cell in cells),
        )
    table.add_row("all questions", *(_percent(row.score) for row in shown))
    return Group(_cell(_title(rows[0].regime)), table, "")


def _sentence(duel: Duel) -> str:
    gap = duel.difference
    if duel.by == "score":
        what, write, gained = "score", _percent, f"ours less theirs {_points(gap)} points"
    else:
        what, write = "KL to the full cache", _nats
        gained = f"theirs less ours {_span(gap, _signed)} nats"
    if duel.ratio is not None:
        gained += f", theirs over ours {_span(duel.ratio, _nats)}"
    sure = "the interval excludes zero" if gap.excludes_zero else "the interval includes zero"
    return (
        f"{duel.regime}, budget {duel.budget}, {what}: {OURS} {write(duel.ours)}, {duel.rival} "
        f"(the best public baseline) {write(duel.theirs)} on the {duel.questions} questions of "
        f"{gap.samples} samples that both answered; {gained}; "
        f"{sure if gap.samples > 1 else 'one sample, so no interval'}"
    )


def _cell(content: str) -> Text:
    """A stranger's name: no markup, no control characters."""
    return Text("".join(c if c.isprintable() else "?" for c in content))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _signed(value: float) -> str:
    return f"{value:+.2g}"


def _span(interval: BootstrapInterval, write: Callable[[float], str]) -> str:
    return f"{write(interval.value)} [{write(interval.low)}, {write(interval.high)}]"


def _points(interval: BootstrapInterval | None) -> str:
    """Differences of scores in percentage points."""
    return "-" if interval is None else _span(interval, lambda value: f"{100 * value:+.1f}")


def _beside_full(write: Callable[[MethodSummary], str]) -> Callable[[MethodSummary], str]:
    """The full cache is not compared with itself."""
    return lambda row: "-" if row.method == FULL else write(row)


def _worst(row: MethodSummary) -> str:
    return "-" if row.worst_ratio is None else f"{row.worst_ratio:.0%} {row.worst_task}"


def _kl_interval(row: MethodSummary) -> str:
    return f"[{_nats(row.kl.low)}, {_nats(row.kl.high)}]"


def _nll(row: MethodSummary) -> str:
    return "-" if row.nll_difference is None else _signed(row.nll_difference)


def _true_kl(row: MethodSummary) -> str:
    return "-" if row.true_kl is None else _nats(row.true_kl.value)


def _true_nll(row: MethodSummary) -> str:
    return "-" if row.true_nll_difference is None else _signed(row.true_nll_difference)


def _hits(row: MethodSummary) -> str:
    return "-" if row.hit_rate is None else f"{row.hit_rate:.0%}"


_COLUMNS = (
    _Column("budget", lambda row: row.budget or "-"),
    _Column("share", lambda row: _percent(row.share)),
    _Column("by tensors", lambda row: _percent(row.storage_share)),
    _Column("host MiB", lambda row: f"{row.host_bytes / 2**20:,.1f}"),
    _Column("reads", _beside_full(lambda row: f"{row.read_share:.2%}")),
    _Column("at most", _beside_full(lambda row: f"{row.limit_share:.2%}")),
    _Column("score", lambda row: _percent(row.score)),
    _Column("d score", _beside_full(lambda row: _points(row.difference))),
    _Column("all kept", _beside_full(lambda row: _percent(row.all_kept))),
    _Column("worst task", _beside_full(_worst)),
    _Column("KL", lambda row: _nats(row.kl.value)),
    _Column("true KL", _beside_full(_true_kl)),
    _Column("KL, 95%", _beside_full(_kl_interval)),
    _Column("d NLL", _beside_full(_nll)),
    _Column("true d NLL", _beside_full(_true_nll)),
    _Column("agree", _beside_full(lambda row: _percent(row.agreement))),
    _Column("s", lambda row: f"{row.compress_seconds:.2f}"),
    _Column("hit rate", _hits),
)


def next_steps(model: str, profile: str) -> list[str]:
    """Lines that tell what a user can do with what was just made."""
    return [
        "Next, in your own code:",
        "    import hkvprof, hkvprof.runtime",
        f'    model, processor = hkvprof.load_model("{model}")',
        f'    with hkvprof.runtime.apply(model, "{profile}", budget=0.10) as handle:',
        "        model.generate(...)",
        "        print(handle.receipt())",
        "and for your own model: hkvprof calibrate --model ORG/NAME --data YOUR_SAMPLES",
    ]
