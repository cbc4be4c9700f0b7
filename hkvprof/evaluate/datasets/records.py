"""Records of foreign annotation files: read within limits, every field checked by name.

Fields that a layout does not need are ignored: published files gain fields from version to version.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkvprof.errors import SampleError
from hkvprof.files import strict_json
from hkvprof.lazy import require_extra

MAX_FILE_BYTES = 512 * 2**20
"""Largest annotation file; the largest published one of the layouts has about 100 MB."""
MAX_RECORDS = 1_000_000
MAX_MARKS = 16_000_000
"""Most commas and opening brackets of a file, text included: what bounds memory as it is parsed."""


@dataclass(frozen=True)
class Record:
    """One object of an annotation file; `where` names file and place, as errors do."""

    where: str
    fields: Mapping[str, Any]

    def __contains__(self, key: str) -> bool:
        """Whether there is a value that is not null."""
        return self.fields.get(key) is not None

    def get(self, key: str) -> Any:
        """The value as it stands. Raises SampleError where it is missing or null."""
        if key not in self:
            known = ", ".join(_short(name) for name in list(self.fields)[:12])
            raise SampleError(f"{self.where}: field '{key}' is missing; there are: {known}")
        return self.fields[key]

    def wrong(self, key: str, expected: str) -> SampleError:
        """The error for a field that holds something else."""
        found = _short(self.fields.get(key))
        return SampleError(f"{self.where}: field '{key}': expected {expected}, found {found}")

    def text(self, key: str) -> str:
        """A string that is not blank."""
        value = self.get(key)
        if not _is_text(value):
            raise self.wrong(key, "text")
        return value

    def label(self, key: str) -> str:
        """A string or an integer, as a printable string of at most 200 characters."""
        value = self.get(key)
        text = str(value) if type(value) is int else value
        if not _is_text(text) or len(text) > 200 or not text.isprintable():
            raise self.wrong(key, "a short name or a number")
        return text

    def integer(self, key: str, below: int) -> int:
        """An integer from 0 to `below` - 1, also when written as text."""
        value = self.get(key)
        if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
            value = int(value[:20])
        if type(value) is not int or not 0 <= value < below:
            raise self.wrong(key, f"a whole number from 0 to {below - 1}")
        return value

    def texts(self, key: str, at_least: int = 1) -> tuple[str, ...]:
        """A list of strings that are not blank."""
        value = self.get(key)
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self.wrong(key, "a list of texts")
        if len(value) < at_least:
            raise self.wrong(key, f"at least {at_least} texts")
        for number, entry in enumerate(value):
            if not _is_text(entry):
                raise SampleError(
                    f"{self.where}: field '{key}[{number}]': expected text, found {_short(entry)}"
                )
        return tuple(value)

    def record(self, key: str) -> Record:
        """An object inside this one."""
        return _record(f"{self.where}: {key}", self.get(key))

    def records(self, key: str) -> list[Record]:
        """A list of objects inside this one."""
        return as_records(f"{self.where}: {key}", self.get(key))


def read_json(root: Path, path: Path) -> Any:
    """The value in a JSON file inside `root`. Raises SampleError."""
    return _parse(str(path), _read(root, path))


def read_lines(root: Path, path: Path) -> list[Record]:
    """One object per line of a .jsonl file inside `root`; blank lines are skipped."""
    text = _read(root, path)
    if sum(text.count(mark) for mark in "{[,") > MAX_MARKS:
        raise SampleError(f"{path} holds more than {MAX_MARKS:,} commas and opening brackets")
    lines = enumerate(text.split("\n"), start=1)
    places = ((f"{path}:{number}", line) for number, line in lines if line.strip())
    return _limited(str(path), (_record(where, _parse(where, line)) for where, line in places))


def read_csv(root: Path, path: Path) -> list[Record]:
    """One record per row of a CSV file with a header."""
    rows = csv.DictReader(io.StringIO(_read(root, path), newline=""), strict=True)
    try:
        return _limited(str(path), (Record(f"{path}:{rows.line_num}", _cells(row)) for row in rows))
    except csv.Error as error:
        raise SampleError(f"{path}:{rows.line_num}: not a CSV file ({error})") from None


def read_parquet(root: Path, path: Path) -> list[Record]:
    """One record per row of a Parquet file."""
    pa, pq = require_extra("pyarrow", "datasets"), require_extra("pyarrow.parquet", "datasets")
    _check_file(root, path)
    try:
        with pq.ParquetFile(path) as file:
            size = sum(
                file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)
            )
            if file.metadata.num_rows > MAX_RECORDS or size > MAX_FILE_BYTES:
                raise _too_large(path, f"{file.metadata.num_rows:,} rows of {size:,} bytes")
            rows = file.read().to_pylist()
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise SampleError(f"{path} is not a readable Parquet file ({_short(error)})") from None
    return [Record(f"{path}: row {number}", row) for number, row in enumerate(rows)]


def as_records(where: str, value: object) -> list[Record]:
    """A list of objects, numbered."""
    if not isinstance(value, list):
        raise SampleError(f"{where}: expected a list of objects, found {_short(value)}")
    return _limited(where, (_record(f"{where}[{i}]", entry) for i, entry in enumerate(value)))


def as_record(path: Path, value: object) -> Record:
    """The object that a whole JSON file holds."""
    return _record(str(path), value)


def _record(where: str, value: object) -> Record:
    if not isinstance(value, Mapping):
        raise SampleError(f"{where}: expected an object, found {_short(value)}")
    return Record(where, value)


def _cells(row: dict[Any, Any]) -> dict[str, Any]:
    """A row's cells; too many of them are csv's None key, too few its None values."""
    if None in row:
        raise csv.Error("more cells than the header names")
    return row


def _limited(where: str, records: Iterator[Record]) -> list[Record]:
    kept: list[Record] = []
    for record in records:
        if len(kept) == MAX_RECORDS:
            raise SampleError(f"{where}: more than {MAX_RECORDS:,} records")
        kept.append(record)
    return kept


def _parse(where: str, text: str) -> Any:
    try:
        return strict_json.loads_foreign(text, MAX_MARKS)
    except ValueError as error:
        raise SampleError(f"{where}: invalid JSON ({_short(error)})") from None


def _read(root: Path, path: Path) -> str:
    _check_file(root, path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(f"{path}: not UTF-8 at byte {error.start + 1}") from None
    except OSError as error:
        raise SampleError(f"cannot read {path}: {error.strerror or error}") from None


def _check_file(root: Path, path: Path) -> None:
    try:
        within = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle
        within = False
    if not within:
        raise SampleError(f"{path} leads out of {root}: all files must lie inside that folder")
    if not path.is_file():
        raise SampleError(f"{path} is no file")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise _too_large(path, f"{size:,} bytes")


def _too_large(path: Path, found: str) -> SampleError:
    return SampleError(
        f"{path} holds {found}: expected at most {MAX_RECORDS:,} records and "
        f"{MAX_FILE_BYTES:,} bytes"
    )


def _is_text(value: object) -> bool:
    """Text that is not blank and can be written as UTF-8."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in value)


def _short(value: object) -> str:
    """At most 80 characters of a stranger's value, on one line."""
    text = value if isinstance(value, str) and value else repr(value)
    line = text.encode("unicode_escape").decode("ascii")
    return line if len(line) <= 80 else f"{line[:77]}..."
