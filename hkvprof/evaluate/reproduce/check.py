"""What is missing of the benchmarks' files, found before anything loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hkvprof.errors import SampleError, UsageError
from hkvprof.evaluate.datasets.layouts import listed, task_set
from hkvprof.evaluate.datasets.source import ListedQuestion, Source
from hkvprof.evaluate.records import TaskSet
from hkvprof.evaluate.reproduce.benchmarks import Benchmark

MOST_SHOWN = 5
"""Missing files that an error names."""


@dataclass(frozen=True)
class Choice:
    """Which questions of a benchmark are asked: at most `max_samples`, videos of at most
    `max_frames` frames, shown as images one by one or `as_video`."""

    max_samples: int | None = None
    max_frames: int = 16
    as_video: bool = True


@dataclass(frozen=True)
class Found:
    """What there is of one benchmark: the folder, how many questions can be asked, and what is
    missing."""

    benchmark: str
    folder: str
    questions: int
    ready: int
    missing: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether it can be asked."""
        return not self.missing

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON-ready dict."""
        return asdict(self)


def look(benchmark: Benchmark, data: Path, choice: Choice) -> Found:
    """Look at every file of one benchmark; nothing is raised for what is missing."""
    folder = benchmark.folder(data)
    if folder is None:
        return Found(benchmark.name, "", 0, 0, (f"no folder {data / benchmark.places[0]}",))
    try:
        entries = _entries(benchmark, folder, choice)
    except (SampleError, UsageError) as error:
        return Found(benchmark.name, str(folder), 0, 0, (str(error),))
    reasons = [reason for entry in entries if (reason := _reason(entry))]
    unique = tuple(dict.fromkeys(reasons))
    return Found(benchmark.name, str(folder), len(entries), len(entries) - len(reasons), unique)


def load(benchmark: Benchmark, data: Path, choice: Choice) -> TaskSet:
    """The questions of one benchmark. Raises UsageError and SampleError for what is missing."""
    folder = benchmark.folder(data)
    if folder is None:
        raise UsageError(f"no folder {data / benchmark.places[0]}: see --check")
    return task_set(benchmark.name, benchmark.layout, _entries(benchmark, folder, choice))


def require_whole(found: Sequence[Found]) -> None:
    """Raise UsageError unless every benchmark can be asked, naming the first of what is missing."""
    lines = [f"{one.benchmark}: {line}" for one in found for line in one.missing]
    if lines:
        left = len(lines) - MOST_SHOWN
        more = [f"and {left} more"] if left > 0 else []
        raise UsageError(
            f"files are missing: {'; '.join([*lines[:MOST_SHOWN], *more])}. The same command with "
            "--check lists all of them; --only names benchmarks to go on with"
        )


def _entries(benchmark: Benchmark, folder: Path, choice: Choice) -> list[ListedQuestion]:
    source = Source.at(str(folder), choice.max_frames, choice.as_video)
    return listed(benchmark.layout, source, choice.max_samples)


def _reason(entry: ListedQuestion) -> str:
    """Why a question cannot be asked, without the place in the file; empty if it can."""
    try:
        entry.build()
    except SampleError as error:
        place, found, reason = str(error).partition("': ")
        return reason if found and "field '" in place else str(error)
    return ""
