"""The published layouts by name, and the way from a folder on disk to a task set."""

from __future__ import annotations

from collections.abc import Iterable

from hkvprof.errors import SampleError, UsageError
from hkvprof.evaluate.datasets import documents, milebench, mmniah, videos
from hkvprof.evaluate.datasets.source import DatasetQuestion, Layout, ListedQuestion, Source
from hkvprof.evaluate.metrics import EXACT_MATCH
from hkvprof.evaluate.records import TaskSet
from hkvprof.samples.parse import MAX_ID_CHARACTERS, MAX_PARTS
from hkvprof.samples.read import Sample, choose

LAYOUTS: dict[str, Layout] = {
    "milebench": milebench.LAYOUT,
    "vatex": videos.VATEX_LAYOUT,
    "nextqa": videos.NEXTQA_LAYOUT,
    "videochatgpt": videos.VIDEOCHATGPT_LAYOUT,
    "mmniah": mmniah.LAYOUT,
    "videomme": videos.VIDEOMME_LAYOUT,
    "docvqa": documents.DOCVQA_LAYOUT,
    "ocrbench": documents.OCRBENCH_LAYOUT,
}


def load_layout(
    name: str, path: str, max_samples: int | None = None, max_frames: int = 16
) -> TaskSet:
    """The questions of the dataset at `path`, which lies there in the published layout `name`.

    `max_samples` chooses a subset balanced over sub-tasks, the same for the same files; only the
    chosen questions are checked in full. Raises UsageError, or SampleError naming file, record and
    field.
    """
    if name not in LAYOUTS:
        raise UsageError(f"unknown layout {name!r}: expected one of {', '.join(LAYOUTS)}")
    if max_frames < 1 or (max_samples is not None and max_samples < 1):
        raise UsageError(f"max_frames {max_frames}, max_samples {max_samples}: expected at least 1")
    layout = LAYOUTS[name]
    entries = listed(layout, Source.at(path, max_frames), max_samples)
    return task_set(f"{name}:{path}", layout, entries)


def listed(layout: Layout, source: Source, max_samples: int | None = None) -> list[ListedQuestion]:
    """The questions of a dataset, or a subset balanced over sub-tasks; images are not looked at.

    Raises UsageError, SampleError.
    """
    entries = _unique(layout.entries(source))
    if not entries:
        raise SampleError(f"{source.file or source.root} holds no question of this layout")
    if max_samples is not None:
        chosen = choose([(entry.task, entry.id) for entry in entries], max_samples, seed=0)
        entries = [entries[position] for position in chosen]
    return entries


def task_set(name: str, layout: Layout, entries: Iterable[ListedQuestion]) -> TaskSet:
    """These questions, each checked in full. Raises SampleError naming file, record and field."""
    built = [(entry, entry.build()) for entry in entries]
    samples = tuple(_sample(entry, question) for entry, question in built)
    gold = {entry.id: question.gold for entry, question in built}
    return TaskSet(name, samples, EXACT_MATCH, layout.max_new_tokens, gold)


def _sample(entry: ListedQuestion, question: DatasetQuestion) -> Sample:
    """The user's message alone, with the first correct answer as the reply."""
    if len(question.parts) > MAX_PARTS:
        raise SampleError(
            f"the question {entry.id!r} has {len(question.parts)} images and texts: expected at "
            f"most {MAX_PARTS}"
        )
    message = {"role": "user", "content": question.parts}
    return Sample(entry.id, entry.task, (message,), reply=question.gold.references[0])


def _unique(entries: Iterable[ListedQuestion]) -> list[ListedQuestion]:
    """All entries; an id that occurs twice is refused."""
    kept: dict[str, ListedQuestion] = {}
    for entry in entries:
        if entry.id in kept:
            raise SampleError(f"the question {entry.id!r} occurs twice: ids must be unique")
        if len(entry.id) > MAX_ID_CHARACTERS:
            raise SampleError(f"the id {entry.id!r} has over {MAX_ID_CHARACTERS} characters")
        kept[entry.id] = entry
    return list(kept.values())
