"""What is asked in an evaluation, and how an answer is scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hkvprof.errors import UsageError
from hkvprof.evaluate.datasets.layouts import LAYOUTS, load_layout
from hkvprof.evaluate.metrics import EXACT_MATCH, Metric, check_installed
from hkvprof.evaluate.records import TaskSet
from hkvprof.models.processing import ChatProcessor
from hkvprof.samples.read import load_samples

GENERATED = ("tinyvl", "longtext")
MAX_FRAMES = 16

TINYVL_UNJUDGED = ("nimg",)
"""Tasks that tinyvl itself gets right less than 60% of the time at 16 images (docs/testbed.md);
they say nothing about compression."""

LONGTEXT_JUDGED = ("passkey", "needle_words", "needle_phone", "needle_motto", "two_needles", "copy")
"""Kinds that SmolLM2 answers with a full cache (`python -m tools.longtext_accuracy`).
Of the others only the distance to the full cache is taken."""


def load_tasks(
    name: str,
    processor: ChatProcessor | None,
    per_task: int,
    tokens: str = "2500",
    max_samples: int | None = None,
    max_frames: int = MAX_FRAMES,
) -> TaskSet:
    """The tasks called `name`: `tinyvl`, `longtext`, a sample folder or file, or `LAYOUT:PATH`.

    Samples of `tinyvl` have 12 or 16 images and one later question; those of `longtext` (they alone
    need `processor`) about `tokens` tokens (a number, or a range such as 2000-8000 over which they
    are spread evenly) and one later question, or a text and what really follows it; the first
    samples of a task are the same for any `per_task`.
    `max_samples` picks a subset of the others that is balanced over tasks; `max_frames` bounds the
    frames of a video. Raises UsageError, SampleError.
    """
    if max_samples is not None and max_samples < 1:
        raise UsageError(f"max_samples is {max_samples}: expected at least 1")
    if name in GENERATED and max_samples is not None:
        raise UsageError(f"{name} takes --per-task, not --max-samples")
    if name == "tinyvl":
        return _tinyvl(per_task)
    if name == "longtext":
        return _longtext(processor, per_task, tokens)
    layout, colon, path = name.partition(":")
    if colon and layout in LAYOUTS:
        tasks = load_layout(layout, path, max_samples, max_frames)
        check_installed([tasks.metric, *(gold.metric for gold in tasks.gold.values())])
        return tasks
    if Path(name).exists():
        return _folder(name, max_samples)
    raise UsageError(
        f"unknown tasks {name!r}: expected tinyvl, longtext, the path of a sample folder or file, "
        f"or LAYOUT:PATH with a layout among {', '.join(LAYOUTS)} (docs/tasks.md)"
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
    from hkvprof.testbed.generator import TASKS, make_sample

    samples = [
        make_sample(task, seed, images=(12, 16)[seed % 2], split="heldout", followups=1)
        for task in TASKS
        if task not in TINYVL_UNJUDGED
        for seed in range(per_task)
    ]
    return TaskSet("tinyvl", tuple(samples), EXACT_MATCH, max_new_tokens=16)


def _longtext(processor: ChatProcessor | None, per_task: int, tokens: str) -> TaskSet:
    from hkvprof.evaluate.longtext import GOLDEN, TASKS, is_correct, make_sample, parse_range
    from hkvprof.evaluate.truetext import KINDS, make_text

    assert processor is not None, "longtext is cut by the model's tokens"

    def count(text: str) -> int:
        return len(processor.encode_text(text))

    low, high = parse_range(tokens)
    samples, truth = [], {}
    for index in range(per_task):
        for number, kind in enumerate(TASKS):
            place = (index + number / len(TASKS)) * GOLDEN % 1.0
            length = round(low + place * (high - low))
            sample = make_sample(kind, index, length, "heldout", followups=1, count_tokens=count)
            samples.append(sample if kind in LONGTEXT_JUDGED else replace(sample, reply=None))
        for number, kind in enumerate(KINDS):
            place = (index + number / len(KINDS)) * GOLDEN % 1.0
            text, truth[f"heldout-text_{kind}-{index:06d}"] = make_text(
                kind, index, round(low + place * (high - low)), count
            )
            samples.append(text)
    metric = Metric("every_part", is_correct)
    return TaskSet("longtext", tuple(samples), metric, max_new_tokens=32, truth=truth)


def _folder(name: str, max_samples: int | None) -> TaskSet:
    """Samples of a folder or file that have a reply to score answers by."""
    whole = whole_folder(name, max_samples)
    kept = tuple(sample for sample in whole.samples if sample.reply is not None)
    if not kept:
        raise UsageError(f"{name}: no sample has a reply to judge answers by")
    return replace(whole, samples=kept)


def whole_folder(name: str, max_samples: int | None = None) -> TaskSet:
    """Samples of a folder, file or dataset, with and without replies. Raises SampleError."""
    samples = load_samples(name, max_samples=max_samples).samples
    return TaskSet(name, samples, EXACT_MATCH, max_new_tokens=64)
