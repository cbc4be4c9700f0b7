"""Answers on disk, line by line, so that a run that was stopped goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any

from hkvprof.errors import HkvError, UsageError, counted
from hkvprof.evaluate.records import Answer
from hkvprof.files import strict_json
from hkvprof.files.atomic import read_limited, write_atomically

CONDITIONS = "conditions.json"
MAX_BYTES = 512 * 2**20
"""Largest file of answers that is read; an answer has about a kilobyte."""
_MAX_MARKS = 100_000
_KINDS = {"str": (str,), "int": (int,), "float": (int, float),
          "float | None": (int, float, NoneType)}  # fmt: skip
_FIELDS = {field.name: _KINDS[str(field.type)] for field in fields(Answer)}
_NEEDED = set(_FIELDS) - {"runtime_kl"}
"""Answers of before there were engines lack the last one."""
Unit = tuple[str, str, str]
"""Sample, method, budget: what is done at one go."""


class Journal:
    """A folder of answers made under the same conditions.

    Several processes may fill it, each with a shard of the samples and a file of its own.
    """

    def __init__(self, folder: Path | None, conditions: Mapping[str, Any], shard: str = "") -> None:
        """Open or create. Raises UsageError where the folder holds answers of other conditions."""
        self._path: Path | None = None
        self._unwritten: Mapping[str, Any] | None = None
        self.answers: list[Answer] = []
        if folder is None:
            return
        if not _agree(folder, conditions):
            self._unwritten = conditions
        self._path = folder / f"answers{shard}.jsonl"
        for path in sorted(folder.glob("answers*.jsonl")):
            found, cut = _read(path)
            self.answers += found
            if cut and path == self._path:
                write_atomically(path, _lines(found))

    @property
    def done(self) -> set[Unit]:
        """The units whose answers are on disk: they need not be asked again."""
        return {_unit(answer) for answer in self.answers}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever stops what is within, but for wrong usage: its message says what is kept."""
        try:
            yield
        except BaseException as error:
            if self._path is not None and self.answers and not isinstance(error, UsageError):
                count = counted(len(self.answers), "answer")
                error.add_note(f"{count} kept in {self._path.parent}: run again to go on")
            raise

    def add(self, answers: Iterable[Answer]) -> None:
        """Keep all answers of a unit: on disk before this returns. Raises HkvError."""
        new = list(answers)
        self.answers += new
        if self._path is None:
            return
        if self._unwritten is not None:
            text = json.dumps(self._unwritten, indent=2, sort_keys=True) + "\n"
            write_atomically(self._path.parent / CONDITIONS, text.encode())
            self._unwritten = None
        try:
            with self._path.open("ab") as file:
                file.write(_lines(new))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise HkvError(
                f"cannot write {self._path}: {error.strerror or error}. Free some space and run "
                "the same command again: it goes on from the answers that are there"
            ) from error


def check_conditions(folder: Path | None, known: Mapping[str, Any]) -> None:
    """Raise UsageError where the folder holds answers of other conditions, as far as `known`."""
    if folder is not None:
        _agree(folder, known, only=known.keys())


def read_answers(folder: Path) -> list[Answer]:
    """All complete answers in a folder, of every shard. Raises UsageError where there are none."""
    found = [one for path in sorted(folder.glob("answers*.jsonl")) for one in _read(path)[0]]
    if not found:
        raise UsageError(f"no answers in {folder}: expected a folder that `hkvprof eval -o` wrote")
    return found


def read_conditions(folder: Path) -> dict[str, Any]:
    """What the answers in a folder were made with. Raises UsageError where that is not told."""
    path = folder / CONDITIONS
    if not path.is_file():
        raise UsageError(
            f"no {CONDITIONS} in {folder}: expected a folder that `hkvprof eval -o` wrote"
        )
    return _read_conditions(path)


def forget(folder: Path) -> None:
    """Remove what a Journal writes, and the folder if nothing else is in it."""
    for file in [*folder.glob("answers*.jsonl"), folder / CONDITIONS]:
        file.unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _agree(
    folder: Path, conditions: Mapping[str, Any], only: Collection[str] | None = None
) -> bool:
    """Whether the folder holds answers, of these conditions (of `only` these, if given)."""
    path = folder / CONDITIONS
    if not path.exists():
        if any(folder.glob("answers*.jsonl")):
            raise UsageError(f"{folder} holds answers but no {CONDITIONS}: use another folder")
        return False
    theirs = _read_conditions(path)
    mine = json.loads(json.dumps(conditions))
    names = {*mine, *theirs} if only is None else only
    differing = [k for k in sorted(names) if mine.get(k) != theirs.get(k)]
    if differing:
        said = "; ".join(f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} now" for k in differing)
        raise UsageError(
            f"{folder} holds answers of other conditions ({said}): use another folder, or the same "
            "options to go on"
        )
    return True


def _read_conditions(path: Path) -> dict[str, Any]:
    try:
        found = strict_json.loads(read_limited(path, MAX_BYTES).decode("utf-8"), _MAX_MARKS)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): use another folder") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a JSON object: use another folder")
    return found


def _lines(answers: Iterable[Answer]) -> bytes:
    return "".join(json.dumps(asdict(a), sort_keys=True) + "\n" for a in answers).encode()


def _read(path: Path) -> tuple[list[Answer], bool]:
    """The answers of complete units, and whether something was cut off by a crash."""
    try:
        data = read_limited(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): use another folder") from None
    whole = data.rfind(b"\n") + 1
    answers = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        record = _record(line)
        if record is None:
            raise UsageError(
                f"{path}, line {number}: not an answer of this version: use another folder"
            )
        answers.append(Answer(**record))
    counts = Counter(_unit(a) for a in answers)
    complete = [a for a in answers if counts[_unit(a)] == a.questions]
    return complete, whole < len(data) or len(complete) < len(answers)


def _record(line: bytes) -> dict[str, Any] | None:
    """The fields of an answer, each of its kind; None for anything else.

    A likelihood may be infinite, which `json` writes as a word of its own.
    """
    try:
        record = strict_json.loads_foreign(line.decode("utf-8"), _MAX_MARKS)
    except ValueError:
        return None
    if not isinstance(record, dict) or not _NEEDED <= set(record) <= set(_FIELDS):
        return None
    sound = all(type(value) in _FIELDS[name] for name, value in record.items())
    return record if sound else None


def _unit(answer: Answer) -> Unit:
    return answer.sample, answer.method, answer.budget
