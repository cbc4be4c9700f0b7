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
)
from rich.text import Text

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


class Pace:
    """How long items take, those left out that were done before (a run that goes on from a folder
    gets through them in no time)."""

    _DONE_BEFORE = 0.02
    """Of the slowest item's time: what took less did no work."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._times: list[float] = []
        self._since = time.monotonic()

    def step(self) -> None:
        """One more item is done."""
        now = time.monotonic()
        self._times.append(now - self._since)
        self._since, self.done = now, self.done + 1

    @property
    def each(self) -> float:
        """Seconds of an item that is worked on; 0 before the first."""
        least = max(self._times, default=0.0) * self._DONE_BEFORE
        worked = [spent for spent in self._times if spent > least]
        return sum(worked) / len(worked) if worked else 0.0

    def __str__(self) -> str:
        """Such as `3.1/s, 2:05 left`."""
        left = duration(self.each * max(0, self.total - self.done))
        return ", ".join(filter(None, (rate(self.each), f"{left} left")))


class _Paced(ProgressColumn):
    """What Pace says, in a bar."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self.pace = pace

    def render(self, task: Task) -> Text:
        """See ProgressColumn."""
        return Text(str(self.pace) if self.pace.done else "")


def track(iterable: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield from `iterable` while showing progress."""
    if sys.stderr.isatty():
        return _bar(iterable, description, total)
    return _lines(iterable, description, total)


def rate(each: float) -> str:
    """`3.1/s`, `12.0 s each`, or nothing when unknown. `each` is in seconds per item."""
    if each <= 0:
        return ""
    return f"{1 / each:.1f}/s" if each <= 1 else f"{each:.1f} s each"


def duration(seconds: float) -> str:
    """`2:05`, in minutes and seconds; from an hour on `3 h 07 min`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bar(iterable: Iterable[T], description: str, total: int) -> Iterator[T]:
    pace = Pace(total)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        _Paced(pace),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for item in progress.track(iterable, total=total, description=description):
            yield item
            pace.step()


def _lines(iterable: Iterable[T], description: str, total: int) -> Iterator[T]:
    """A line after the first item, then every SECONDS_BETWEEN_LINES, and at the end."""
    pace, due = Pace(total), time.monotonic()
    for item in iterable:
        yield item
        pace.step()
        now = time.monotonic()
        if now >= due or pace.done == total:
            print(f"{description}: {pace.done}/{total} ({pace})", file=sys.stderr, flush=True)
            due = now + SECONDS_BETWEEN_LINES
