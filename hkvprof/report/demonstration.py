"""What a demonstration shows of an evaluation: examples, one table, a verdict. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hkvprof.errors import counted
from hkvprof.evaluate.baselines import baselines
from hkvprof.evaluate.records import FULL, OURS, REGIMES, Answer
from hkvprof.evaluate.statistics import Duel, MethodSummary, duels, summarise
from hkvprof.profile.budgets import Budget
from hkvprof.report.certainty import plain
from hkvprof.report.comparison import order
from hkvprof.report.folding import FoldingTable
from hkvprof.report.picture import half_blocks
from hkvprof.report.summary import human, percent
from hkvprof.samples.record import Sample

MOST_EXAMPLES = 3
PICTURE_COLUMNS = 36
_MOST_TEXT = 200
"""Characters of a question's end that are shown."""
_LABEL = re.compile(r"#\d+")
_SHORT = {regime: f"Question {regime}" for regime in REGIMES} | {
    "inside": "Question known",
    "after": "Question to come",
}
"""How a verdict calls a regime."""


@dataclass(frozen=True)
class Example:
    """A sample's own question in the compressed prompt, and what every method says to it."""

    sample: Sample
    answers: tuple[Answer, ...]

    @property
    def question(self) -> str:
        """The text that ends the prompt."""
        texts = [part["text"] for part in _parts(self.sample) if part["type"] == "text"]
        return str(texts[-1]) if texts else ""

    @property
    def picture(self) -> tuple[str, Image.Image] | None:
        """The picture that question or reply names, else the first: its label, and itself."""
        labelled = _labelled(self.sample)
        for label in _LABEL.findall(f"{self.question} {self.answers[0].expected}"):
            if label in labelled:
                return label, labelled[label]
        return next(iter(labelled.items()), None)


def examples(answers: Sequence[Answer], samples: Sequence[Sample]) -> list[Example]:
    """The first MOST_EXAMPLES of the samples whose question the full cache answers correctly,
    whatever the others say to it."""
    found = []
    for sample in samples:
        said = [a for a in answers if (a.sample, a.regime, a.turn) == (sample.id, "inside", 0)]
        said.sort(key=lambda one: {FULL: 0, OURS: 1}.get(one.method, 2))
        if said and said[0].method == FULL and said[0].score == 1:
            found.append(Example(sample, tuple(said)))
    return found[:MOST_EXAMPLES]


def example_page(example: Example, number: int, pictures: bool) -> RenderableType:
    """Question and answers, beside the picture that is asked about if there are `pictures`."""
    first, shown = example.answers[0], example.picture
    said = Table.grid(padding=(0, 2))
    said.add_row("expected", plain(first.expected), "")
    for one in example.answers:
        said.add_row(_name(one.method, one.budget), plain(one.text), _judged(one))
    question = Text(f"{number}. {plain(example.question[-_MOST_TEXT:])}", "bold")
    if not pictures or shown is None:
        return Group(question, said, Text())
    beside = Table.grid(padding=(0, 2))
    beside.add_row(half_blocks(shown[1], PICTURE_COLUMNS), Group(question, Text(), said))
    label = f"picture {shown[0]} of {len(_labelled(example.sample))}"
    return Group(beside, Text(label, "dim"), Text())


def demonstration_table(summaries: Sequence[MethodSummary]) -> Group:
    """Per regime: every method's bytes, reads, score, and distance to the full cache."""
    regimes = dict.fromkeys(one.regime for one in summaries)
    return Group(*(_regime([s for s in summaries if s.regime == regime]) for regime in regimes))


def _regime(summaries: Sequence[MethodSummary]) -> Group:
    rows = sorted(order(summaries), key=lambda one: one.method != FULL)
    questions, samples = counted(rows[0].answers, "question"), counted(rows[0].kl.samples, "sample")
    figures = ("bytes kept", "reads a step", "score", "KL to full")
    table = FoldingTable("", *figures, right=figures)
    for one in rows:
        table.add_row(_name(one.method, one.budget), *_figures(one))
    return Group(Text(f"{REGIMES[rows[0].regime]} ({questions}, {samples})", "bold"), table, Text())


def verdict(answers: Sequence[Answer], seconds: float | None = None) -> list[str]:
    """A line per regime on the answers, and one on the price; `seconds` that calibration took."""
    rivals = {one.method for one in answers} - {FULL, OURS}
    ours = [one for one in summarise(answers) if one.method == OURS]
    fought = {d.regime: d for d in duels(answers, rivals) if d.by == "score"}
    lines = [_sentence(one, fought.get(one.regime)) for one in ours]
    reads = max(one.read_share for one in ours)
    host = human(max(one.host_bytes for one in ours))
    price = f"a step reads {reads:.1%} of the dense bytes from host memory, where {host} lie"
    made = "" if seconds is None else f"; calibrated once, in {seconds:.0f} s"
    return [*lines, f"Price: {price if reads else 'nothing is read from host memory'}{made}."]


def lengths(answers: Sequence[Answer]) -> str:
    """How long the prompts of the answers are, in words."""
    tokens = [one.prompt_tokens for one in answers]
    least, most = min(tokens, default=0), max(tokens, default=0)
    return f"{least:,} to {most:,} tokens" if least < most else f"{most:,} tokens"


def _sentence(ours: MethodSummary, duel: Duel | None) -> str:
    kept = "-" if ours.score_share is None else f"{ours.score_share:.0%}"
    text = (
        f"{_SHORT[ours.regime]}: {OURS} keeps {kept} of the full cache's score at "
        f"{ours.share:.1%} of its bytes"
    )
    if duel is None:
        return f"{text}."
    gap, rival = duel.difference, _name(duel.rival, "")
    points = f"{100 * gap.value:+.0f} points [{100 * gap.low:+.0f}, {100 * gap.high:+.0f}]"
    if gap.samples < 2 or not gap.excludes_zero:
        few = f"on {counted(gap.samples, 'sample')}"
        return f"{text}, not told from {rival} {few} ({points})."
    return f"{text}, {'better' if gap.value > 0 else 'worse'} than {rival} by {points}."


def _figures(one: MethodSummary) -> tuple[str, str, str, str]:
    score = "-" if one.score is None else f"{one.score:.1%}"
    if one.method == FULL:
        return f"{one.share:.1%}", "-", score, "-"
    return f"{one.share:.1%}", f"{one.read_share:.1%}", score, f"{one.kl.value:.2g}"


def _name(method: str, budget: str) -> str:
    known = baselines()
    name = "full cache" if method == FULL else known[method].title if method in known else method
    share = Budget.parse(budget).share if budget else None
    return name if not budget else f"{name} {budget if share is None else percent(share)}"


def _judged(one: Answer) -> str:
    if one.score is None or 0 < one.score < 1:
        return "" if one.score is None else f"{one.score:.0%}"
    return "right" if one.score else "wrong"


def _parts(sample: Sample) -> list[Mapping[str, Any]]:
    contents = [message["content"] for message in sample.messages if message["role"] == "user"]
    return [
        part
        for content in contents
        for part in ([{"type": "text", "text": content}] if isinstance(content, str) else content)
    ]


def _labelled(sample: Sample) -> dict[str, Image.Image]:
    """Pictures in memory by the label before them (`#3`), or by their place."""
    found: dict[str, Image.Image] = {}
    before = ""
    for part in _parts(sample):
        if part["type"] == "text":
            before = part["text"]
        elif part["type"] == "image" and "image" in part:
            labels = _LABEL.findall(before)
            found[labels[-1] if labels else f"#{len(found) + 1}"] = part["image"]
            before = ""
    return found
