"""From answers on disk to the figures that papers print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from hkvprof.evaluate.records import FULL, Answer, TaskSet
from hkvprof.evaluate.reproduce.benchmarks import IMAGES, Benchmark
from hkvprof.evaluate.reproduce.judging import judgements
from hkvprof.evaluate.reproduce.published import IMAGES_MEAN, Row
from hkvprof.evaluate.scorers.cider import cider
from hkvprof.evaluate.scorers.judge import ASPECTS, mean_score


@dataclass(frozen=True)
class BenchmarkScore:
    """One benchmark under one method: the figure as papers print it (None where nothing is
    judged), over `answered` of `questions`; `share` of dense bytes that were resident."""

    benchmark: str
    method: str
    budget: str
    value: float | None
    answered: int
    questions: int
    share: float

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON-ready dict."""
        return asdict(self)


def score(
    benchmark: Benchmark,
    tasks: TaskSet,
    answers: Iterable[Answer],
    judged: Mapping[str, int],
) -> list[BenchmarkScore]:
    """Every method's figure on one benchmark, in the order of first appearance.

    CIDEr counts rare words over what this method answered; `judged` are scores by key.
    """
    rows: dict[Row, list[Answer]] = {}
    for answer in answers:
        rows.setdefault((answer.method, answer.budget), []).append(answer)
    return [
        BenchmarkScore(
            benchmark.name, *row, _figure(benchmark, tasks, given, judged), len(given),
            len(tasks.samples),
            sum(a.resident_bytes for a in given) / sum(a.dense_bytes for a in given),
        )
        for row, given in rows.items()
    ]  # fmt: skip


def images_mean(scores: Sequence[BenchmarkScore]) -> list[BenchmarkScore]:
    """The mean over tasks of MileBench of every method that answered all of them in part."""
    images = [one for one in scores if one.benchmark.startswith(f"{IMAGES}/")]
    tasks = {one.benchmark for one in images}
    means = []
    for row in dict.fromkeys((one.method, one.budget) for one in images):
        mine = [one for one in images if (one.method, one.budget) == row and one.value is not None]
        if {one.benchmark for one in mine} == tasks:
            counts = sum(one.answered for one in mine), sum(one.questions for one in mine)
            value = fmean(one.value for one in mine if one.value is not None)
            share = fmean(one.share for one in mine)
            means.append(BenchmarkScore(IMAGES_MEAN, *row, value, *counts, share))
    return means


def common(answers: Sequence[Answer]) -> list[Answer]:
    """Answers to the questions that the full cache has answered too."""
    known = {a.sample for a in answers if a.method == FULL}
    return [a for a in answers if a.sample in known]


def _figure(
    benchmark: Benchmark, tasks: TaskSet, answers: Sequence[Answer], judged: Mapping[str, int]
) -> float | None:
    match benchmark.figure:
        case "cider":
            references = {a.sample: tasks.gold[a.sample].references for a in answers}
            return fmean(cider({a.sample: a.text for a in answers}, references).values())
        case "judge":
            return _judged(tasks, answers, judged)
        case _:
            return 100 * fmean(a.score for a in answers if a.score is not None)


def _judged(tasks: TaskSet, answers: Sequence[Answer], judged: Mapping[str, int]) -> float | None:
    """The mean over aspects; None unless all that can be judged is."""
    wanted = judgements(tasks, answers)
    if not wanted or any(one.key not in judged for one in wanted):
        return None
    by_aspect = {
        aspect: [judged[one.key] for one in wanted if one.aspect == aspect] for aspect in ASPECTS
    }
    return mean_score({aspect: given for aspect, given in by_aspect.items() if given})
