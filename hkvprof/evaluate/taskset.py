"""The record of an evaluation's questions: samples, correct answers, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hkvprof.evaluate.metrics import Metric
from hkvprof.samples.read import Sample


@dataclass(frozen=True)
class Gold:
    """The correct answers to one question, any of which will do, and how they are compared."""

    references: tuple[str, ...]
    metric: Metric

    def score(self, answer: str) -> float:
        """The score of an answer, from 0 to 1: that against the best of the correct ones."""
        return self.metric(answer, self.references)


@dataclass(frozen=True)
class TaskSet:
    """Samples and how they are scored; `max_new_tokens` bounds every answer.

    `gold` holds, by sample id, the correct answers and the metric of questions that have several
    answers or a metric of their own. All others, and later questions, are scored by `metric`
    against the sample's reply.
    """

    name: str
    samples: tuple[Sample, ...]
    metric: Metric
    max_new_tokens: int
    gold: Mapping[str, Gold] = field(default_factory=dict)

    def gold_of(self, sample: Sample, turn: int) -> Gold:
        """What is correct in one turn of a sample: 0 is the prompt's question."""
        if turn > 0:
            return Gold((sample.followups[turn - 1].reply,), self.metric)
        return self.gold.get(sample.id) or Gold((sample.reply or "",), self.metric)
