"""All methods on all benchmarks: one folder of answers per benchmark, gone on with at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hkvprof.evaluate.compare import compare
from hkvprof.evaluate.contest import ComparisonPlan, MethodAtBudget, ProfiledModel
from hkvprof.evaluate.journal import Journal, check_conditions, read_answers
from hkvprof.evaluate.records import Answer, TaskSet
from hkvprof.evaluate.reproduce.benchmarks import Benchmark
from hkvprof.evaluate.reproduce.check import Choice
from hkvprof.evaluate.reproduce.judging import Judgements, judgements
from hkvprof.evaluate.reproduce.published import BUDGETS, METHODS
from hkvprof.evaluate.reproduce.scoring import BenchmarkScore, common, images_mean, score
from hkvprof.evaluate.scorers.judge import Judge

STEPS = 16
"""Forced tokens per question, for the distance to the full cache: here it is scores that count."""
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
Asked = Mapping[Benchmark, TaskSet]


@dataclass(frozen=True)
class AnswersPlace:
    """Where answers lie, and which part of the samples this process asks: (part, parts)."""

    output: Path
    part: tuple[int, int] = (1, 1)

    @property
    def shard(self) -> str:
        """What names the files of this part."""
        part, parts = self.part
        return "" if parts == 1 else f"-{part}of{parts}"

    def folder(self, benchmark: Benchmark) -> Path:
        """The folder of one benchmark's answers."""
        return self.output / benchmark.slug


def plan(itemsize: int | None) -> ComparisonPlan:
    """The paper's budgets and methods, the question inside the prompt."""
    return ComparisonPlan(BUDGETS, METHODS, ("inside",), STEPS, itemsize=itemsize)


def conditions(benchmark: Benchmark, choice: Choice, comparison: ComparisonPlan) -> dict[str, Any]:
    """What answers to one benchmark depend on, beside model and profile."""
    shown = {"max_frames": choice.max_frames, "as_video": choice.as_video}
    return {"tasks": benchmark.name, **shown, **comparison.conditions()}


def check_all(place: AnswersPlace, known: Mapping[Benchmark, Mapping[str, Any]]) -> None:
    """Raise UsageError where a folder holds answers of other conditions."""
    for benchmark, told in known.items():
        check_conditions(place.folder(benchmark), told)


def answer_all(
    profiled: ProfiledModel,
    asked: Asked,
    known: Mapping[Benchmark, Mapping[str, Any]],
    comparison: ComparisonPlan,
    place: AnswersPlace,
    track: Track,
) -> dict[str, dict[MethodAtBudget, str]]:
    """Ask what is not answered yet; per benchmark, what could not meet its budget and why.

    Raises as `compare` does; what is answered is kept.
    """
    refused: dict[str, dict[MethodAtBudget, str]] = {}
    part, parts = place.part
    for benchmark, tasks in asked.items():
        mine = replace(tasks, samples=tasks.samples[part - 1 :: parts])
        if not mine.samples:
            continue
        folder = place.folder(benchmark)
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(folder, known[benchmark], place.shard)
        with journal.kept():
            why: dict[MethodAtBudget, str] = {}
            compare(profiled, mine, comparison, journal, _named(track, benchmark), why)
            refused[benchmark.name] = why
    return refused


def judge_all(asked: Asked, comparison: ComparisonPlan, place: AnswersPlace, judge: Judge,
              track: Track) -> None:  # fmt: skip
    """Have judged what is answered and not judged. Raises HkvError."""
    for benchmark, tasks in asked.items():
        if benchmark.figure == "judge" and (answers := _answers(benchmark, place)):
            kept = Judgements(place.folder(benchmark), judge.name, place.shard)
            for group in _by_method(comparison.select(answers, tasks)):
                kept.ask(judge, judgements(tasks, group), track)


def scores(
    asked: Asked, comparison: ComparisonPlan, place: AnswersPlace, judge: str | None
) -> list[BenchmarkScore]:
    """Figures of all that is answered so far, by all parts; the images' mean comes first."""
    found: list[BenchmarkScore] = []
    for benchmark, tasks in asked.items():
        answers = common(comparison.select(_answers(benchmark, place), tasks))
        judged: Mapping[str, int] = {}
        if benchmark.figure == "judge":
            judged = Judgements(place.folder(benchmark), judge).scores
        found += score(benchmark, tasks, answers, judged)
    return [*images_mean(found), *found]


def _answers(benchmark: Benchmark, place: AnswersPlace) -> list[Answer]:
    folder = place.folder(benchmark)
    return read_answers(folder) if any(folder.glob("answers*.jsonl")) else []


def _by_method(answers: Sequence[Answer]) -> list[list[Answer]]:
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.method, answer.budget), []).append(answer)
    return list(groups.values())


def _named(track: Track, benchmark: Benchmark) -> Track:
    """Progress under the benchmark's name."""
    return lambda items, _, total: track(items, benchmark.name, total)
