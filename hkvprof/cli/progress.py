"""Progress on stderr: a bar with rate and time left, or plain lines off a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


class _Rate(ProgressColumn):
    """Items per second, or seconds per item when slow."""

    def render(self, task: Task) -> Text:
        """See ProgressColumn."""
        return Text(rate(task.speed or 0.0))


def track(iterable: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield from `iterable` while showing progress."""
    if sys.stderr.isatty():
        return _bar(iterable, description, total)
    return _lines(iterable, description, total)


def rate(speed: float) -> str:
    """`3.1/s`, `12.0 s each`, or nothing when unknown. `speed` is in items per second."""
    if speed <= 0:
        return ""
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


def _bar(iterable: Iterable[T], description: str, total: int) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(iterable, total=total, description=description)


def _lines(iterable: Iterable[T], description: str, total: int) -> Iterator[T]:
    """A line after the first item, then every SECONDS_BETWEEN_LINES, and at the end."""
    start = time.monotonic()
    due = start
    done = 0
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now >= due or done == total:
            print(_line(description, done, total, now - start), file=sys.stderr, flush=True)
            due = now + SECONDS_BETWEEN_LINES


def _line(description: str, done: int, total: int, seconds: float) -> str:
    speed = done / max(seconds, 1e-9)
    left = max(0, total - done) / speed
    minutes, rest = divmod(round(left), 60)
    return f"{description}: {done}/{total} ({rate(speed)}, {minutes}:{rest:02d} left)"
