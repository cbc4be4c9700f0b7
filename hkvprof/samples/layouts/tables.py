"""Where rows come from: JSON, lines of JSON, CSV, datasets, lists; read within limits."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from hkvprof.errors import SampleError
from hkvprof.files.atomic import read_limited
from hkvprof.files.strict_json import loads_foreign
from hkvprof.samples.layouts.drafts import Columns, Row

MAX_FILE_BYTES = 2 * 2**30
"""Largest file of JSON, CSV or text; LLaVA's 665,000 conversations have 1 GB."""
MAX_MARKS = 64_000_000
"""Most commas and opening brackets of a JSON file: what bounds memory as it is parsed."""
_SMALLER = "take a part of it, or write it as .jsonl or Parquet in several files"


class Table(Protocol):
    """Rows by number, whatever they are read from."""

    @property
    def name(self) -> str:
        """What errors and default ids begin with."""
        ...

    @property
    def columns(self) -> Columns:
        """The names of all columns."""
        ...

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def column(self, name: str) -> Sequence[Any]:
        """One value per row; None where a row has none."""
        ...

    def row(self, number: int) -> Row:
        """A row. Raises SampleError where it cannot be read."""
        ...

    def where(self, number: int) -> str:
        """What errors call the row."""
        ...


@dataclass(frozen=True)
class ListTable:
    """Rows in memory; an error in the place of a row is raised when the row is asked for."""

    name: str
    rows: Sequence[Row | SampleError]
    places: Sequence[str] = ()

    @cached_property
    def columns(self) -> Columns:
        """See Table."""
        return frozenset(str(key) for row in self.rows if isinstance(row, Mapping) for key in row)

    def __len__(self) -> int:
        """See Table."""
        return len(self.rows)

    def column(self, name: str) -> Sequence[Any]:
        """See Table."""
        return [row.get(name) if isinstance(row, Mapping) else None for row in self.rows]

    def row(self, number: int) -> Row:
        """See Table."""
        row = self.rows[number]
        if isinstance(row, SampleError):
            raise row
        if not isinstance(row, Mapping):
            raise SampleError(f"expected an object, found {str(row)[:60]!r}")
        return row

    def where(self, number: int) -> str:
        """See Table."""
        return self.places[number] if self.places else f"{self.name}: record {number}"


@dataclass(frozen=True)
class DatasetTable:
    """A dataset of `datasets`, whose image columns hold bytes (samples.hub.without_decoding)."""

    name: str
    dataset: Any

    @property
    def columns(self) -> Columns:
        """See Table."""
        return frozenset(self.dataset.column_names)

    def __len__(self) -> int:
        """See Table."""
        return len(self.dataset)

    def column(self, name: str) -> Sequence[Any]:
        """See Table."""
        return list(self.dataset[name])

    def row(self, number: int) -> Row:
        """See Table."""
        row: Row = self.dataset[number]
        return row

    def where(self, number: int) -> str:
        """See Table."""
        return f"{self.name}: row {number}"


def read_json(path: Path) -> Any:
    """The value of a JSON file, or the list of the objects on its lines. Raises SampleError."""
    content = read_text(path)
    try:
        return loads_foreign(content, MAX_MARKS)
    except ValueError as error:
        first = content.strip().partition("\n")
        try:
            if first[1] and isinstance(loads_foreign(first[0], MAX_MARKS), dict):
                return _lines(path, content)[0]
        except ValueError:
            pass
        hint = f"; {_SMALLER}" if "commas" in str(error) else ""
        raise SampleError(f"{path} is not a readable JSON file ({error}){hint}") from None


def read_lines(path: Path) -> ListTable:
    """One row per line of JSON that is not blank. Raises SampleError."""
    rows, numbers = _lines(path, read_text(path))
    return ListTable(path.stem, rows, [f"{path}:{number}" for number in numbers])


def _lines(path: Path, content: str) -> tuple[list[Any], list[int]]:
    if sum(content.count(mark) for mark in "{[,") > MAX_MARKS:
        raise SampleError(f"{path} has over {MAX_MARKS:,} commas and opening brackets; {_SMALLER}")
    rows: list[Any] = []
    numbers = [n for n, line in enumerate(content.split("\n"), start=1) if line.strip()]
    for line in content.split("\n"):
        if not line.strip():
            continue
        try:
            rows.append(loads_foreign(line, MAX_MARKS))
        except ValueError as error:
            rows.append(SampleError(f"expected one JSON object per line ({error})"))
    return rows, numbers


def read_csv(path: Path) -> ListTable:
    """One row per record of a CSV file, or a TSV file, with a header; empty cells are None."""
    tabs = path.suffix.lower() == ".tsv"
    before = csv.field_size_limit(MAX_FILE_BYTES)
    try:
        reader = csv.DictReader(
            io.StringIO(read_text(path), newline=""), delimiter="\t" if tabs else ",", strict=True
        )
        rows, places = [], []
        for row in reader:
            if None in row:
                raise SampleError(f"{path}:{reader.line_num}: more cells than the header has names")
            rows.append({name: cell or None for name, cell in row.items()})
            places.append(f"{path}:{reader.line_num}")
    except csv.Error as error:
        raise SampleError(f"{path} is not a readable CSV file ({error})") from None
    finally:
        csv.field_size_limit(before)
    return ListTable(path.stem, rows, places)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file within MAX_FILE_BYTES. Raises SampleError."""
    try:
        return read_limited(path, MAX_FILE_BYTES).decode("utf-8-sig")
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise SampleError(
                f"{path}: expected UTF-8, found other bytes at byte {error.start + 1}"
            ) from None
        raise SampleError(f"{path} has {error}; {_SMALLER}") from None
    except OSError as error:
        raise SampleError(f"cannot read {path}: {error.strerror or error}") from None


def first_object(path: Path, most: int) -> Any:
    """What the first line that is not blank holds, if it is JSON; else None."""
    try:
        with path.open("rb") as stream:
            for line in _short_lines(stream, most):
                if line.strip():
                    return loads_foreign(line.decode("utf-8-sig"), MAX_MARKS)
    except (OSError, ValueError):
        return None
    return None


def _short_lines(stream: Any, most: int) -> Iterator[bytes]:
    while line := stream.readline(most):
        yield line
