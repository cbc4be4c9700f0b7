"""Folders of rows that belong together, as one body."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from hkvprof.artifact import ProjectedIndexTables
from hkvprof.errors import UsageError
from hkvprof.profile.conditions import ROW_SCHEMA, Conditions
from hkvprof.profile.rows import INDEX, SampleRow, read_conditions, read_rows, read_tables

_MOST_NAMED = 5
Gathered = tuple[Conditions, list[SampleRow], ProjectedIndexTables | None]


def gather(folders: Iterable[Path]) -> Gathered:
    """Conditions, rows (sorted by id) and index tables of folders that belong together.

    Raises UsageError where conditions or tables differ, or a sample lies in two folders.
    """
    paths = list(folders)
    _check_distinct(paths)
    conditions = read_conditions(paths[0])
    if conditions.row_schema != ROW_SCHEMA:
        raise UsageError(
            f"{paths[0]} holds rows of version {conditions.row_schema}, and this hkvprof reads "
            f"{ROW_SCHEMA}: measure again"
        )
    rows: dict[str, SampleRow] = {}
    origin: dict[str, Path] = {}
    tables: tuple[ProjectedIndexTables, str] | None = None
    for path in paths:
        if differing := conditions.differences(read_conditions(path)):
            raise UsageError(
                f"{paths[0]} and {path} were measured under different conditions "
                f"({', '.join(differing)}): their rows cannot be merged"
            )
        found = read_rows(path, conditions)
        _check_overlap([row.id for row in found], origin, path)
        rows |= {row.id: row for row in found}
        origin |= {row.id: path for row in found}
        if (path / INDEX).exists():
            mine = read_tables(path, conditions)
            if tables is not None and not _same_tables(tables[0], mine[0]):
                raise UsageError(
                    f"{path}: its index differs from that of the folders before it, and rows "
                    "depend on the index: measure all shards with the same --data"
                )
            tables = mine
    if not rows:
        raise UsageError(f"{', '.join(map(str, paths))}: no rows yet")
    return conditions, sorted(rows.values(), key=lambda row: row.id), tables and tables[0]


def _check_distinct(paths: list[Path]) -> None:
    if not paths:
        raise UsageError("there is nothing to merge: name one or more folders of rows")
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"{path} is given {places.count(place)} times: name each folder once")


def _check_overlap(samples: list[str], origin: dict[str, Path], path: Path) -> None:
    """A sample must count once: also where its rows are equal, the folders overlap by mistake."""
    twice = [sample for sample in samples if sample in origin]
    if not twice:
        return
    named = ", ".join(map(repr, twice[:_MOST_NAMED]))
    more = f" and {len(twice) - _MOST_NAMED} more" if len(twice) > _MOST_NAMED else ""
    raise UsageError(
        f"{origin[twice[0]]} and {path} both hold sample{'s'[: len(twice) > 1]} {named}{more}: a "
        "sample counts once; give different samples different ids, or leave one folder out"
    )


def _same_tables(first: ProjectedIndexTables, second: ProjectedIndexTables) -> bool:
    mine, theirs = first.tensors(), second.tensors()
    return mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k]) for k in mine)
