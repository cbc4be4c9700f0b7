"""Rows on disk: a folder with one small file per measured sample.

A run that was stopped goes on from its folder, several processes may fill one (each with a shard of
the samples), and `merge` makes a profile of folders without a model. Files are safetensors, written
whole or not at all, and checked when they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hkvprof.artifact import ProjectedIndexTables
from hkvprof.checks import check_index, expect, require
from hkvprof.errors import ProfileError, UsageError
from hkvprof.files import write_atomically
from hkvprof.profile.conditions import Conditions

CONDITIONS = "conditions.json"
INDEX = "index.safetensors"
_KEY = "hkvprof_row"
_MOST_BYTES = 64 * 2**20
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError,
               RecursionError, OverflowError)  # fmt: skip


@dataclass(frozen=True)
class SampleRow:
    """What one sample contributes.

    `tokens` of the prompt, `vision_tokens` of them hold an image or a video, `context_tokens` long
    text that plays their part;
    `sparsity` [kappas, layers, query_heads]; `losses` [3 terms, strategies, layers, kv_heads,
    ratios] (statistics.LayerLosses); `digest` of the prompt's tokens and pixels and the replies.
    """

    id: str
    task: str
    tokens: int
    sparsity: NDArray[np.float32]
    losses: NDArray[np.float32]
    digest: str = ""
    vision_tokens: int = 0
    context_tokens: int = 0


class RowFolder:
    """Rows measured under the same conditions, and the index tables they were measured with."""

    def __init__(self, path: Path, conditions: Conditions) -> None:
        """Open or, with the first row, create. Raises UsageError for other conditions' folders."""
        self.path, self.conditions = path, conditions
        self._known = (path / CONDITIONS).exists()
        if self._known:
            found = read_conditions(path)
            if differing := conditions.differences(found):
                raise UsageError(
                    f"{path} holds rows that were measured under other conditions "
                    f"({', '.join(differing)}): give another folder with --rows, or delete it"
                )
        elif path.exists() and any(path.iterdir()):
            raise UsageError(f"{path} is no folder of rows and not empty: give another with --rows")

    def find(self, sample: str, digest: str) -> SampleRow | None:
        """The row of a sample, if it is there and of the same content."""
        file = self.path / _file_name(sample)
        if not file.exists():
            return None
        row = read_row(file, self.conditions)
        return row if row.digest == digest else None

    def add(self, row: SampleRow) -> None:
        """Write a row. Raises HkvError."""
        self._begin()
        about = {"id": row.id, "task": row.task, "tokens": row.tokens, "digest": row.digest,
                 "vision_tokens": row.vision_tokens, "context_tokens": row.context_tokens,
                 "conditions": self.conditions.digest}  # fmt: skip
        tensors = {"sparsity": row.sparsity, "losses": row.losses}
        data = save(tensors, {_KEY: json.dumps(about, sort_keys=True)})
        write_atomically(self.path / _file_name(row.id), data)

    def tables(self, fitted_on: str) -> ProjectedIndexTables | None:
        """The index tables; None where there are none yet.

        `fitted_on` is a digest of the samples. Raises UsageError where it was others.
        """
        if not (self.path / INDEX).exists():
            return None
        found, samples = read_tables(self.path, self.conditions)
        if samples != fitted_on:
            raise UsageError(
                f"{self.path}: its index was fitted on other samples, and rows depend on the index:"
                " give another folder with --rows (or the same --data and --max-samples)"
            )
        return found

    def keep_tables(self, tables: ProjectedIndexTables, fitted_on: str) -> None:
        """Write the index tables. Raises HkvError."""
        self._begin()
        about = json.dumps({"sizes": list(tables.sizes), "fitted_on": fitted_on})
        write_atomically(self.path / INDEX, save(tables.tensors(), {_KEY: about}))

    def _begin(self) -> None:
        if not self._known:
            write_atomically(self.path / CONDITIONS, self.conditions.to_json().encode())
            self._known = True


def forget(path: Path) -> None:
    """Remove what a RowFolder writes, and the folder if nothing else is in it."""
    for file in [*path.glob("row-*.safetensors"), path / INDEX, path / CONDITIONS]:
        file.unlink(missing_ok=True)
    if path.exists() and not any(path.iterdir()):
        path.rmdir()


def _file_name(sample: str) -> str:
    return f"row-{hashlib.sha256(sample.encode()).hexdigest()[:32]}.safetensors"


def read_conditions(path: Path) -> Conditions:
    """The conditions of a folder. Raises UsageError."""
    file = path / CONDITIONS
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("the file is too large")
        return Conditions.from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path} holds no rows: expected a folder made by `hkvprof calibrate --rows`"
        ) from None
    except _UNREADABLE as error:
        raise UsageError(f"{file} cannot be read ({error}): measure again") from None


def read_rows(path: Path, conditions: Conditions) -> list[SampleRow]:
    """All rows of a folder. Raises UsageError for damaged ones."""
    return [read_row(file, conditions) for file in sorted(path.glob("row-*.safetensors"))]


def read_row(file: Path, conditions: Conditions) -> SampleRow:
    """One row, checked. Raises UsageError."""
    grid = conditions.grid
    shapes = {
        "sparsity": (len(conditions.kappas), grid.layers, grid.query_heads),
        "losses": (3, len(conditions.strategies), grid.layers, grid.kv_heads,
                   len(conditions.ratios)),
    }  # fmt: skip
    try:
        about, tensors = _read(file)
        require(set(tensors) == set(shapes), f"expected {sorted(shapes)}, found {sorted(tensors)}")
        for name, shape in shapes.items():
            expect(name, tensors[name], shape, np.float32)
        require(about["conditions"] == conditions.digest, "the row is of other conditions")
        row = SampleRow(
            id=about["id"], task=about["task"], tokens=about["tokens"], digest=about["digest"],
            vision_tokens=about["vision_tokens"], context_tokens=about["context_tokens"], **tensors,
        )  # fmt: skip
        texts = (row.id, row.task, row.digest)
        require(all(isinstance(text, str) for text in texts), "id, task and digest must be texts")
        require(type(row.tokens) is int and row.tokens > 0, "tokens must be a number above 0")
        for name in ("vision_tokens", "context_tokens"):
            count = getattr(row, name)
            require(
                type(count) is int and 0 <= count <= row.tokens,
                f"{name} must be a number from 0 to {row.tokens}, found {count!r}",
            )
        require(file.name == _file_name(row.id), "the file's name does not go with its sample")
        return row
    except (*_UNREADABLE, ProfileError) as error:
        raise UsageError(
            f"{file} is not a sound row ({error}): delete it, and run `hkvprof calibrate` with the "
            "same options again"
        ) from None


def read_tables(path: Path, conditions: Conditions) -> tuple[ProjectedIndexTables, str]:
    """The index tables of a folder and the digest of the samples they were fitted on."""
    try:
        about, tensors = _read(path / INDEX)
        tables = ProjectedIndexTables.take(tuple(about["sizes"]), tensors)
        require(not tensors, f"unknown tensors {sorted(tensors)}")
        check_index(tables, conditions.grid)
        return tables, str(about["fitted_on"])
    except (*_UNREADABLE, ProfileError) as error:
        raise UsageError(f"{path / INDEX} cannot be read ({error}): measure again") from None


def _read(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES:,} bytes")
    with safe_open(file, framework="numpy") as stream:
        about = json.loads((stream.metadata() or {})[_KEY])
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    return about, tensors


def gather(folders: Iterable[Path]) -> tuple[Conditions, list[SampleRow], Any]:
    """Conditions, rows (sorted by id) and index tables of folders that belong together.

    Raises UsageError where conditions or tables differ, or a sample was measured twice with
    different results.
    """
    paths = list(folders)
    if not paths:
        raise UsageError("there is nothing to merge: name one or more folders of rows")
    conditions = read_conditions(paths[0])
    rows: dict[str, SampleRow] = {}
    tables: tuple[ProjectedIndexTables, str] | None = None
    for path in paths:
        if differing := conditions.differences(read_conditions(path)):
            raise UsageError(
                f"{paths[0]} and {path} were measured under different conditions "
                f"({', '.join(differing)}): their rows cannot be merged"
            )
        for row in read_rows(path, conditions):
            if row.id in rows and not _same(rows[row.id], row):
                raise UsageError(
                    f"sample {row.id!r} was measured twice, with different results (in {path} and "
                    "before): give its sample sets different ids, or leave one folder out"
                )
            rows[row.id] = row
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


def _same(first: SampleRow, second: SampleRow) -> bool:
    return (
        (first.task, first.tokens, first.vision_tokens, first.context_tokens, first.digest)
        == (second.task, second.tokens, second.vision_tokens, second.context_tokens, second.digest)
        and np.array_equal(first.sparsity, second.sparsity)
        and np.array_equal(first.losses, second.losses)
    )


def _same_tables(first: ProjectedIndexTables, second: ProjectedIndexTables) -> bool:
    mine, theirs = first.tensors(), second.tensors()
    return mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k]) for k in mine)
