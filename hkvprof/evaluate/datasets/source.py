"""What a layout's loader gets and gives: the dataset's folder, and one entry per question."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from hkvprof.errors import SampleError, UsageError
from hkvprof.evaluate.records import Gold
from hkvprof.samples.images import find_image

Part = dict[str, Any]

MAX_PATH_CHARACTERS = 1024
ANNOTATION_FOLDERS = ("annotations", "Benchmarking_QA", "json_files", "MC", "OE", "qas",
                      "spdocvqa_qas", "videomme")  # fmt: skip
"""Folders of annotation files: the dataset's own folder is the one above."""


@dataclass(frozen=True)
class Source:
    """The folder of a dataset, which no path may leave, and the file that was asked for, if any.

    `max_frames` bounds the frames of a video, which are images or, `as_video`, one video.
    """

    root: Path
    file: Path | None
    max_frames: int
    as_video: bool = False

    @classmethod
    def at(cls, path: str, max_frames: int, as_video: bool = False) -> Source:
        """The dataset at `path`: its folder, or one annotation file. Raises UsageError."""
        where = _resolved(path) if path else None
        if where is None:
            raise UsageError(f"no dataset at {path!r}: expected LAYOUT:PATH with a folder or file")
        if where.is_dir():
            return cls(where, None, max_frames, as_video)
        nested = where.parent.name in ANNOTATION_FOLDERS
        root = where.parent.parent if nested else where.parent
        return cls(root, where, max_frames, as_video)

    def find(self, *names: str) -> Path:
        """The annotation file: the one asked for, or the first of `names` that is there."""
        found = self.find_all(*names)
        if not found:
            raise UsageError(f"{self.root} holds none of {', '.join(names)} (docs/tasks.md)")
        return found[0]

    def find_all(self, *names: str) -> list[Path]:
        """The file asked for, or all of `names` (patterns) that are there, in that order."""
        if self.file is not None:
            return [self.file]
        return [path for name in names for path in sorted(self.root.glob(name)) if path.is_file()]


def _resolved(path: str) -> Path | None:
    """What is there, links followed; None where nothing is or can be."""
    try:
        return Path(path).expanduser().resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        return None


@dataclass(frozen=True)
class DatasetQuestion:
    """One question: the user's message in parts, what is correct, and its metric."""

    parts: list[Part]
    gold: Gold


@dataclass(frozen=True)
class ListedQuestion:
    """One question of a dataset, not read yet: its sub-task, its id, and how to make it."""

    task: str
    id: str
    build: Callable[[], DatasetQuestion]


@dataclass(frozen=True)
class Layout:
    """A published folder layout: how its entries are listed, and the longest answer in tokens."""

    entries: Callable[[Source], Iterable[ListedQuestion]]
    max_new_tokens: int


def text_part(text: str) -> Part:
    """A part of a message that holds text."""
    return {"type": "text", "text": text}


def image_part(
    root: Path, folders: tuple[str, ...], written: str, where: str, other: tuple[str, ...] = ()
) -> Part:
    """The image called `written` below the first of `folders` that has it, or one of `other`.

    `where` names file, record and field. Raises SampleError if there is none or it lies outside.
    """
    if not written.isprintable() or len(written) > MAX_PATH_CHARACTERS:
        raise SampleError(f"{where}: expected the path of an image, found {written[:80]!r}")
    names = [f"{folder}/{written}" if folder else written for folder in folders]
    if PurePath(written).is_absolute():
        names = [written]
    try:
        there = [name for name in (*names, *other) if (root / name).is_file()]
        return {"type": "image", "path": find_image(root, (there or names)[0])}
    except SampleError as error:
        raise SampleError(f"{where}: {error}") from None
    except OSError as error:  # a part of the name is too long
        raise SampleError(f"{where}: {error.strerror}: {written[:80]!r}") from None


def interleave(
    text: str, mark: re.Pattern[str], image: Callable[[re.Match[str]], Part]
) -> list[Part]:
    """Text with an image in the place of every mark; blank text between images is left out."""
    parts: list[Part] = []
    end = 0
    for match in mark.finditer(text):
        parts += [text_part(text[end : match.start()]), image(match)]
        end = match.end()
    parts.append(text_part(text[end:]))
    return [part for part in parts if part["type"] == "image" or part["text"].strip()]


def ask(question: str, options: Iterable[str]) -> str:
    """A question with lettered options, and the request for a letter."""
    lines = [f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(options)]
    return "\n".join(
        [question, *lines, "Answer with the option's letter from the given choices directly."]
    )
