"""Rows of Parquet files, of which one row group at a time is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hkvprof.errors import HkvError, SampleError
from hkvprof.lazy import require_extra
from hkvprof.samples.layouts.drafts import Columns, Row

MAX_GROUP_BYTES = 4 * 2**30
"""Largest row group of a file, unpacked: one is in memory at a time."""
MAX_ROWS = 10_000_000
"""Most rows of all files together; their ids are in memory."""


@dataclass
class ParquetTable:
    """Parquet files, one after the other; the row group of the last row asked for is in memory."""

    name: str
    files: Sequence[Path]
    _held: tuple[int, list[Row]] = field(default=(-1, []), repr=False)

    @cached_property
    def _groups(self) -> list[tuple[Path, int, int]]:
        """File, number in it and first row of every row group."""
        groups, first = [], 0
        for path in self.files:
            with _open(path) as file:
                for number in range(file.num_row_groups):
                    group = file.metadata.row_group(number)
                    if group.total_byte_size > MAX_GROUP_BYTES:
                        raise SampleError(
                            f"{path}: row group {number} has {group.total_byte_size:,} bytes: "
                            f"expected at most {MAX_GROUP_BYTES:,}; write smaller row groups"
                        )
                    groups.append((path, number, first))
                    first += group.num_rows
                    if not 0 <= group.num_rows <= MAX_ROWS or first > MAX_ROWS:
                        raise SampleError(f"{path}: expected at most {MAX_ROWS:,} rows in all")
        return [*groups, (Path(), 0, first)]

    @cached_property
    def columns(self) -> Columns:
        """See Table."""
        with _open(self.files[0]) as file:
            return frozenset(file.schema_arrow.names)

    def __len__(self) -> int:
        """See Table."""
        return self._groups[-1][2]

    def column(self, name: str) -> Sequence[Any]:
        """See Table."""
        count, values = len(self), list[Any]()
        for path in self.files:
            with _open(path) as file:
                if name in file.schema_arrow.names:
                    values += file.read(columns=[name]).column(0).to_pylist()
                else:
                    groups = range(file.num_row_groups)
                    values += [None] * sum(file.metadata.row_group(i).num_rows for i in groups)
        if len(values) != count:
            raise SampleError(f"{self.name}: {count} rows are promised, {len(values)} are there")
        return values

    def row(self, number: int) -> Row:
        """See Table."""
        at = self._group_of(number)
        path, group, first = self._groups[at]
        if self._held[0] != at:
            with _open(path) as file:
                self._held = (at, file.read_row_group(group).to_pylist())
        if number - first >= len(self._held[1]):
            raise SampleError("the row is promised, and not there: the file is damaged")
        return self._held[1][number - first]

    def _group_of(self, number: int) -> int:
        return max(i for i, group in enumerate(self._groups[:-1]) if group[2] <= number)

    def where(self, number: int) -> str:
        """See Table."""
        at = self._group_of(number)
        start = min(group[2] for group in self._groups[:-1] if group[0] == self._groups[at][0])
        return f"{self._groups[at][0]}: row {number - start}"


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The file, opened; whatever fails inside is an error that names it."""
    pq = require_extra("pyarrow.parquet", "datasets")
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (HkvError, MemoryError):
        raise
    except Exception as error:  # pyarrow raises nearly anything on damaged files
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SampleError(f"{path} is not a readable Parquet file ({line[:200]})") from None
