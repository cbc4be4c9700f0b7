"""A table in a layout: what is taken from which column, ids and tasks, and the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hkvprof.samples.layouts.drafts import IDS, RowLayout
from hkvprof.samples.layouts.pictures import Pictures
from hkvprof.samples.layouts.questions import ALL
from hkvprof.samples.layouts.tables import Table
from hkvprof.samples.parse import MAX_ID_CHARACTERS, parse_record
from hkvprof.samples.record import Sample

NATIVE = "hkvprof"
"""The name of hkvprof's own layout: samples.jsonl, and datasets with its columns."""


@dataclass(frozen=True)
class Recognised:
    """A layout by name and title, what becomes of which field, and what was chosen."""

    name: str = NATIVE
    title: str = "samples of hkvprof"
    fields: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people: one line, then one per field. Nothing for hkvprof's own layout."""
        if self.name == NATIVE:
            return list(self.notes)
        width = max((len(field) for field, _ in self.fields), default=0)
        mapped = [f"  {field:{width}}  {meaning}" for field, meaning in self.fields]
        return [f"recognised: {self.title} (--data-format {self.name})", *mapped, *self.notes]


@dataclass(frozen=True)
class Opened:
    """A table in a layout: where its pictures lie, and the question for all, if there is one."""

    table: Table
    layout: RowLayout
    pictures: Pictures
    question: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def recognised(self) -> Recognised:
        """What is taken from which of the table's columns."""
        columns = self.table.columns | ({ALL} if self.question else set())
        fields = tuple(
            ("--question" if field == ALL else field, meaning)
            for field, meaning in self.layout.fields
            if field in columns
        )
        name = self._id_column
        fields = (*fields, (name, "id") if name else ("(row number)", "id"))
        return Recognised(self.layout.name, self.layout.title, fields, self.notes)

    @property
    def _id_column(self) -> str | None:
        """The first column of unique short names."""
        known = (name for name in IDS if name in self.table.columns)
        return next((name for name in known if _are_ids(self.table.column(name))), None)

    def names(self) -> list[tuple[str, str]]:
        """Task and id of every row, without opening a picture."""
        name, count = self.table.name, len(self.table)
        column = self._id_column
        ids = self.table.column(column) if column else [f"{name}-{i:06d}" for i in range(count)]
        tasks: list[str] = [name or "samples"] * count
        for field in reversed(self.layout.tasks):
            if field in self.table.columns:
                given = self.table.column(field)
                tasks = [
                    str(own) if _is_id(own) else task
                    for own, task in zip(given, tasks, strict=True)
                ]
        return [(task, str(id_)) for task, id_ in zip(tasks, ids, strict=True)]

    def entries(
        self, names: Sequence[tuple[str, str]], chosen: Sequence[int]
    ) -> Iterator[tuple[str, Callable[[], Sample]]]:
        """For every chosen row: where it stands, and a function that makes its sample."""
        for number in chosen:
            yield self.table.where(number), partial(self._sample, number, *names[number])

    def _sample(self, number: int, task: str, id_: str) -> Sample:
        row = self.table.row(number)
        if self.question:
            row = {**row, ALL: self.question}
        draft = self.layout.build(row, self.pictures)
        return parse_record({**draft, "id": id_, "task": task}, str, _film)


def _film(path: str, fps: float) -> dict[str, Any]:
    """A video file that its layout has found and checked."""
    return {"type": "video", "path": path, "fps": fps}


def _are_ids(values: Sequence[Any]) -> bool:
    texts = [str(value) for value in values if _is_id(value)]
    return len(texts) == len(values) == len(set(texts))


def _is_id(value: object) -> bool:
    """Whether a value can be the id or the task of a sample."""
    if type(value) is int:
        return True
    return (
        isinstance(value, str)
        and 0 < len(value) <= MAX_ID_CHARACTERS
        and bool(value.strip())
        and value.isprintable()
    )
