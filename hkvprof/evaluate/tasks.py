"""What is asked in an evaluation, and when an answer counts as right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hkvprof.errors import UsageError
from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.samples import Sample, load_samples

Judge = Callable[[str, str], bool]
"""(answer, expected reply) -> right or wrong."""


@dataclass(frozen=True)
class TaskSet:
    """Samples with one way of judging them; `max_new_tokens` bounds every answer."""

    name: str
    samples: tuple[Sample, ...]
    judge: Judge
    max_new_tokens: int


TINYVL_UNJUDGED = ("nimg",)
"""Tasks that tinyvl itself gets right less than 60% of the time at 16 images (docs/testbed.md);
they say nothing about compression."""

LONGTEXT_KINDS = ("passkey", "needle_words", "needle_phone", "needle_motto")
"""Kinds that SmolLM2 answers with a full cache (`python -m hkvprof.evaluate.longtext_accuracy`)."""


def load_tasks(name: str, processor: ChatProcessor, per_task: int, tokens: int = 2500) -> TaskSet:
    """The held-out tasks called `name`: `tinyvl`, `longtext`, or a folder or file of samples.

    Samples of `tinyvl` have 12 or 16 images and one later question; those of `longtext` about
    `tokens` tokens and one later question. Raises UsageError or SampleError.
    """
    if name == "tinyvl":
        return _tinyvl(per_task)
    if name == "longtext":
        return _longtext(processor, per_task, tokens)
    if Path(name).exists():
        samples = load_samples(name).samples
        kept = tuple(sample for sample in samples if sample.reply is not None)
        if not kept:
            raise UsageError(f"{name}: no sample has a reply to judge answers by")
        return TaskSet(name, kept, _same, max_new_tokens=64)
    raise UsageError(
        f"unknown tasks {name!r}: expected tinyvl, longtext, or the path of a sample folder or file"
    )


def default_tasks(model_name: str) -> str:
    """The task set that goes with a model's name. Raises UsageError where there is none."""
    known = {"tinyvl": "tinyvl", "smollm2": "longtext"}
    if model_name not in known:
        raise UsageError(
            f"no task set belongs to {model_name!r}: give --tasks longtext or --tasks PATH"
        )
    return known[model_name]


def _tinyvl(per_task: int) -> TaskSet:
    from hkvprof.testbed.generator import make_sample
    from hkvprof.testbed.questions import TASKS

    samples = [
        make_sample(task, seed, images=(12, 16)[seed % 2], split="heldout", followups=1)
        for task in TASKS
        if task not in TINYVL_UNJUDGED
        for seed in range(per_task)
    ]
    return TaskSet("tinyvl", tuple(samples), _same, max_new_tokens=16)


def _longtext(processor: ChatProcessor, per_task: int, tokens: int) -> TaskSet:
    from hkvprof.evaluate.longtext import is_correct, make_sample

    def count(text: str) -> int:
        return len(processor.encode_text(text))

    samples = [
        make_sample(kind, index, tokens, "heldout", followups=1, count_tokens=count)
        for kind in LONGTEXT_KINDS
        for index in range(per_task)
    ]
    return TaskSet("longtext", tuple(samples), is_correct, max_new_tokens=32)


def _same(answer: str, expected: str) -> bool:
    """Equal apart from white space."""
    return "".join(answer.split()) == "".join(expected.split())
