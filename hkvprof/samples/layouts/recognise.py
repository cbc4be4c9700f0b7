"""Which layout a file, folder or dataset has, what is taken from which field, and its rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hkvprof.errors import SampleError, UsageError
from hkvprof.samples.layouts.chat import CHAT, has_foreign_parts, has_places
from hkvprof.samples.layouts.columns import CAULDRON, MMMU
from hkvprof.samples.layouts.conversations import LLAVA
from hkvprof.samples.layouts.drafts import Columns, Row, RowLayout
from hkvprof.samples.layouts.folders import MILEBENCH
from hkvprof.samples.layouts.opened import NATIVE, Opened
from hkvprof.samples.layouts.pictures import Pictures, is_inside
from hkvprof.samples.layouts.questions import (
    ALPACA,
    ANSWERS,
    CHARTQA,
    IMAGES,
    PICTURES,
    QUESTION,
    QUESTIONS,
    TEXT,
    VIDEOS,
)
from hkvprof.samples.layouts.tables import Table

LAYOUTS: dict[str, RowLayout] = {
    layout.name: layout
    for layout in (
        MILEBENCH, MMMU, CAULDRON, LLAVA, CHAT, ALPACA, CHARTQA, QUESTION, VIDEOS, PICTURES, TEXT,
    )
}  # fmt: skip
"""All others, the more particular ones first: the first that fits is taken."""
BESIDE = (
    "images", "png", "train_images", "test_images", "train2014", "val2014", "test2015",
    "train2017", "val2017", "documents",
)  # fmt: skip
"""Folders beside a file in which published sets keep their pictures."""


@dataclass(frozen=True)
class Reading:
    """How a source is to be read: a layout by name (None: by its looks), the folder of pictures
    (None: beside the file), and a question for pictures and texts that have none."""

    layout: str | None = None
    image_folder: Path | None = None
    question: str | None = None

    def check(self) -> None:
        """Raise UsageError for a layout that there is none of, and for a folder that is none."""
        if self.layout not in (None, NATIVE, *LAYOUTS):
            known = ", ".join((NATIVE, *LAYOUTS))
            raise UsageError(f"--data-format {self.layout}: expected one of {known}")
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise UsageError(f"--image-folder {self.image_folder}: no such folder")
        if self.question is not None and not self.question.strip():
            raise UsageError("--question is empty: expected a question, or leave it out")

    def refuse_unused(self, title: str) -> None:
        """Raise UsageError where a question is given for samples that have their own."""
        if self.question is not None:
            raise UsageError(
                f"--question is for pictures and texts without questions: this is {title}"
            )

    def pictures(self, *beside: Path) -> Pictures:
        """Where pictures may lie: in the folder that is named, beside the data, and in folders that
        published sets have there."""
        bases = [*([self.image_folder] if self.image_folder else []), *beside]
        below = [
            folder / name for folder in bases for name in BESIDE if is_inside(folder, name)
        ]  # a link out of the data is none of its folders
        return Pictures((*bases, *(folder for folder in below if folder.is_dir())))


def recognise(columns: Columns) -> RowLayout | None:
    """The first layout that fits the columns of a table."""
    return next((layout for layout in LAYOUTS.values() if layout.fits(columns)), None)


def opened(table: Table, reading: Reading, *beside: Path, notes: tuple[str, ...] = ()) -> Opened:
    """A table in the layout that is wanted or recognised, its pictures `beside` it.

    Raises SampleError, UsageError.
    """
    layout = LAYOUTS[reading.layout] if reading.layout else recognise(table.columns)
    if layout is None:
        columns = ", ".join(sorted(table.columns)[:20]) or "none"
        known = "; ".join(
            f"{one.name}: {', '.join(f for f, _ in one.fields[:3])}" for one in _SHOWN
        )
        raise SampleError(
            f"{table.name} has the fields {columns}: expected those of a known layout ({known}; "
            "docs/calibration.md), or name one with --data-format"
        )
    if layout not in (PICTURES, VIDEOS, TEXT):
        reading.refuse_unused(layout.title)
    return Opened(table, layout, reading.pictures(*beside), reading.question, notes)


_SHOWN = (LLAVA, CHAT, QUESTION, ALPACA)


def is_native(first: object) -> bool:
    """Whether a line of JSON, the first of its file, is one of samples.jsonl: it has its fields, or
    none of another layout's, so that errors are those of samples.jsonl."""
    if isinstance(first, list):
        return False
    if not isinstance(first, Mapping):
        return True
    if {"id", "task", "messages"} <= set(first):
        return not has_foreign_parts(first)
    return recognise(frozenset(str(key) for key in first)) is None


def is_native_dataset(columns: Columns, first: Row) -> bool:
    """Whether a dataset has the columns that docs/sample-format.md describes, or none of another
    layout's, so that errors are those of hkvprof's own; `first` is its first row."""
    layout = recognise(columns)
    if layout is CHAT:
        return not has_places(first) and not has_foreign_parts(first)
    if layout is QUESTION:
        named = columns & {*QUESTIONS, *ANSWERS, *IMAGES}
        return "question" in named and named <= {"question", "image", "images", "reply", "answer"}
    return layout in (None, TEXT)


_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)


def one_split(files: Sequence[Path]) -> tuple[list[Path], tuple[str, ...]]:
    """The files of one split, by their names or their folders': `train` where there is one, else
    the first; and what is said of it where there are others."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        match = _SPLIT.match(path.name) or _SPLIT.fullmatch(path.parent.name)
        splits.setdefault(match[1].lower() if match else "", []).append(path)
    name = "train" if "train" in splits else next(iter(splits))
    others = sorted(set(splits) - {name})
    if not others:
        return list(files), ()
    rest = ", ".join(other or "others" for other in others)
    return splits[name], (f"split: {name}; left out: {rest} (give their folder or file instead)",)
