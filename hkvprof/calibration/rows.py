"""Rows on disk: a folder with one small file per measured sample, and the conditions of them all.

A run that was stopped goes on from its folder, several processes may fill one (each with a shard of
the samples), and `merge` makes a profile of folders without a model. Files are safetensors, written
whole or not at all, and checked when they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

import hkvprof
from hkvprof.calibration.attention import SampleStatistics
from hkvprof.calibration.fitted import FittedTables
from hkvprof.calibration.recipe import Recipe, RecipeName, Replies
from hkvprof.errors import ProfileError, UsageError
from hkvprof.files import strict_json
from hkvprof.files.atomic import (
    in_turn,
    is_part,
    read_limited,
    remove_stale,
    writable,
    write_atomically,
    write_once,
)
from hkvprof.files.container import read_container
from hkvprof.heads import HeadGrid, KeepRule, ModelFingerprint, Strategy
from hkvprof.profile.bounds import (
    check_ratios,
    check_setting,
    expect,
    expect_shares,
    require,
)
from hkvprof.profile.sizes import KEY as SIZES
from hkvprof.profile.sizes import ModelSizes, sizes_told

CONDITIONS = "conditions.json"
INDEX = "index.safetensors"
MAX_TOKENS = 2**31
_KEY = "hkvprof_row"
_MOST_BYTES = 64 * 2**20
_MOST_CONDITIONS_BYTES = 4 * 2**20
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ProfileError)
ROW_SCHEMA = 2
"""What a row holds; folders before it was recorded have 1."""
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""Of weights and K/V, with their bytes per element."""


@dataclass(frozen=True)
class Conditions:
    """The model, what was measured of it, and with which versions.

    `dtype` is that of the weights and K/V, `replies` "given" or "own" (whatever they are, a `paper`
    row does not depend on them), `versions` those of hkvprof, torch and transformers, `row_schema`
    that of the rows' files. `ratios` of the loss curves: 1 alone where none are measured. `sizes`
    are only told on: rows do not depend on them, and folders of earlier versions have none.
    """

    fingerprint: ModelFingerprint
    recipe: str
    strategies: tuple[Strategy, ...]
    keep: KeepRule
    kappas: tuple[float, ...]
    ratios: tuple[float, ...]
    replies: str
    dtype: str
    versions: tuple[tuple[str, str], ...]
    row_schema: int = ROW_SCHEMA
    sizes: ModelSizes | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        fingerprint: ModelFingerprint,
        dtype: str,
        recipe: Recipe,
        sizes: ModelSizes | None = None,
    ) -> Conditions:
        """Those of a measurement that starts now; `dtype` as in DTYPES."""
        return cls(
            fingerprint=fingerprint,
            recipe=recipe.name,
            strategies=recipe.strategies,
            keep=recipe.keep_rule,
            kappas=recipe.kappas,
            ratios=recipe.ratios,
            replies=recipe.replies,
            dtype=dtype,
            versions=current_versions(),
            sizes=sizes,
        )

    @property
    def measured_by(self) -> Recipe:
        """The recipe of the measurement, with defaults for what is decided after it.

        Raises UsageError for conditions that no recipe has.
        """
        name, replies = cast(RecipeName, self.recipe), cast(Replies, self.replies)
        menu: dict[str, Any] = {}
        if name == "paper":
            menu["chunk"] = max(strategy.chunk for strategy in self.strategies)
            menu["text_prior"] = max(strategy.text_prior for strategy in self.strategies)
        return Recipe(name, replies=replies, keep=self.keep, **menu)

    @property
    def grid(self) -> HeadGrid:
        """The model's attention geometry."""
        return self.fingerprint.grid

    @property
    def itemsize(self) -> int:
        """Bytes per K/V element."""
        return DTYPES[self.dtype]

    @property
    def digest(self) -> str:
        """Of everything that rows depend on: they carry it."""
        return hashlib.sha256(_canonical(self._plain()).encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON; the inverse of `from_json`."""
        told = {} if self.sizes is None else {SIZES: self.sizes.to_json()}
        return _canonical({**self._plain(), **told})

    @classmethod
    def from_json(cls, text: str) -> Conditions:
        """Checked. Raises ValueError, KeyError, TypeError, AttributeError or ProfileError."""
        data = strict_json.loads(text)
        conditions = cls(
            fingerprint=ModelFingerprint.from_json(data["fingerprint"]),
            recipe=str(data["recipe"]),
            strategies=tuple(Strategy.from_json(entry) for entry in data["strategies"]),
            keep=KeepRule(**data["keep"]),
            kappas=tuple(float(kappa) for kappa in data["kappas"]),
            ratios=tuple(float(ratio) for ratio in data["ratios"]),
            replies=str(data["replies"]),
            dtype=str(data["dtype"]),
            versions=tuple(sorted((str(k), str(v)) for k, v in data["versions"].items())),
            row_schema=int(data.get("row_schema", 1)),
            sizes=sizes_told(data),
        )
        check_setting(
            conditions.fingerprint, conditions.recipe, conditions.keep, conditions.strategies,
            conditions.kappas,
        )  # fmt: skip
        require(all(0 < ratio <= 1 for ratio in conditions.ratios), "ratios must lie in (0, 1]")
        check_ratios(np.array(conditions.ratios, dtype=np.float32))
        require(conditions.dtype in DTYPES, f"unknown dtype {conditions.dtype[:40]!r}")
        return conditions

    def differences(self, other: Conditions) -> list[str]:
        """Names of the fields in which another's differ."""
        ours, theirs = self._plain(), other._plain()
        return [name for name in ours if ours[name] != theirs[name]]

    def _plain(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint.to_json(),
            "recipe": self.recipe,
            "strategies": [strategy.to_json() for strategy in self.strategies],
            "keep": asdict(self.keep),
            "kappas": list(self.kappas),
            "ratios": list(self.ratios),
            "replies": self.replies,
            "dtype": self.dtype,
            "versions": dict(self.versions),
            "row_schema": self.row_schema,
        }


def _canonical(plain: dict[str, Any]) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def current_versions() -> tuple[tuple[str, str], ...]:
    """Versions that a measurement depends on."""
    import torch
    import transformers

    return (
        ("hkvprof", hkvprof.__version__),
        ("torch", str(torch.__version__)),
        ("transformers", transformers.__version__),
    )


@dataclass(frozen=True)
class SampleRow:
    """What one sample contributes.

    `tokens` of the prompt, `vision_tokens` of them hold an image or a video, `context_tokens` long
    text that plays their part;
    `sparsity` [kappas, layers, query_heads]; `losses` [3 terms, strategies, layers, kv_heads,
    ratios] (statistics.LayerLosses); `statistics` are what profiles show of heads; `digest` of the
    prompt's tokens and pixels and the replies.
    """

    id: str
    task: str
    tokens: int
    sparsity: NDArray[np.float32]
    losses: NDArray[np.float32]
    statistics: SampleStatistics
    digest: str = ""
    vision_tokens: int = 0
    context_tokens: int = 0

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names in the file."""
        figures = {"sparsity": self.sparsity, "losses": self.losses}
        return {**figures, **self.statistics.tensors()}


def check_foreseen(path: Path, recipe: Recipe, dtype: str, model: ModelFingerprint) -> None:
    """Raise UsageError where a folder holds rows of other conditions, as far as they are known
    before weights are loaded; `dtype` may be "auto"."""
    if not (path / CONDITIONS).exists():
        return
    held = read_conditions(path)
    pairs = {
        "fingerprint": bool(held.fingerprint.mismatches(model)),
        "recipe": held.recipe != recipe.name,
        "strategies": not set(held.strategies) <= set(recipe.strategies),
        "keep": held.keep != recipe.keep_rule,
        "kappas": held.kappas != recipe.kappas,
        "ratios": held.ratios != recipe.ratios,
        "replies": held.replies != recipe.replies,
        "dtype": dtype not in ("auto", held.dtype),
        "versions": dict(held.versions) != dict(current_versions()),
    }
    if differing := [name for name, differs in pairs.items() if differs]:
        raise _of_others(path, differing)


def _of_others(path: Path, differing: Sequence[str]) -> UsageError:
    return UsageError(
        f"{path} holds rows that were measured under other conditions ({', '.join(differing)}): "
        "give another folder with --rows, or start anew with --no-resume"
    )


class RowFolder:
    """Rows measured under the same conditions, and the index tables they were measured with."""

    def __init__(self, path: Path, conditions: Conditions) -> None:
        """Open or, with the first row, create; what killed writers left there is removed.

        Raises UsageError for other conditions' folders and other things' places.
        """
        self.path, self.conditions = path, conditions
        check_rows_folder(path)
        remove_stale(path)
        self._known = (path / CONDITIONS).exists()
        if self._known:
            self._check_conditions()

    def _check_conditions(self) -> None:
        if differing := self.conditions.differences(read_conditions(self.path)):
            raise _of_others(self.path, differing)

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
        data = save(row.tensors(), {_KEY: json.dumps(about, sort_keys=True)})
        write_atomically(self.path / _file_name(row.id), data)

    def tables(self, fitted_on: str) -> FittedTables | None:
        """The index tables; None where there are none yet.

        `fitted_on` is a digest of the samples. Raises UsageError where it was others.
        """
        if not (self.path / INDEX).exists():
            return None
        tables, samples = read_tables(self.path, self.conditions)
        if samples != fitted_on:
            raise UsageError(
                f"{self.path}: its index was fitted on other samples, and rows depend on the index:"
                " give another folder with --rows (or the same --data and --max-samples)"
            )
        return tables

    def keep_tables(self, tables: FittedTables, fitted_on: str) -> FittedTables:
        """Write the index tables, or read those of a process that was faster. Raises as `tables`
        does, and HkvError."""
        self._begin()
        about = json.dumps({"sizes": list(tables.index.sizes), "fitted_on": fitted_on})
        write_once(self.path / INDEX, save(tables.tensors(), {_KEY: about}))
        kept = self.tables(fitted_on)
        assert kept is not None
        return kept

    def in_turn(self, wait: Callable[[Iterator[None]], None]) -> AbstractContextManager[None]:
        """Within: no other process fits an index for this folder. `wait` as files.atomic.in_turn
        has it. Raises as `add` does.
        """
        self._begin()
        return in_turn(self.path / CONDITIONS, wait)

    def _begin(self) -> None:
        """Write the conditions, unless another process did; they must be the same."""
        if self._known:
            return
        if not write_once(self.path / CONDITIONS, self.conditions.to_json().encode()):
            self._check_conditions()
        self._known = True


def check_rows_folder(path: Path) -> None:
    """Raise UsageError unless `path` holds rows, or nothing, and can be written."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: expected a folder for --rows")
    theirs = path.is_dir() and any(not is_part(entry) for entry in path.iterdir())
    if theirs and not (path / CONDITIONS).exists():
        raise UsageError(f"{path} is no folder of rows and not empty: give another with --rows")
    if not writable(path):
        raise UsageError(f"cannot write into {path}: give another folder with --rows")


def has_row(path: Path, sample: str) -> bool:
    """Whether the sample of that id has a row in `path`, be it of other content (`find`)."""
    return (path / _file_name(sample)).exists()


def forget(path: Path) -> None:
    """Remove what a RowFolder writes, and the folder if nothing else is in it.

    The conditions go last: whatever stops this, the folder stays one that can be forgotten.
    """
    remove_stale(path)
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
        return Conditions.from_json(read_limited(file, _MOST_CONDITIONS_BYTES).decode("utf-8"))
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
        names = {*shapes, *SampleStatistics.names()}
        require(set(tensors) == names, f"expected {sorted(names)}, found {sorted(tensors)}")
        statistics = SampleStatistics.take(tensors)
        statistics.check(grid)
        for name, shape in shapes.items():
            expect(name, tensors[name], shape, np.float32)
        require(bool((tensors["losses"] >= 0).all()), "losses holds negative values")
        expect_shares("sparsity", tensors["sparsity"])
        require(about["conditions"] == conditions.digest, "the row is of other conditions")
        row = SampleRow(
            id=about["id"], task=about["task"], tokens=about["tokens"], digest=about["digest"],
            vision_tokens=about["vision_tokens"], context_tokens=about["context_tokens"],
            statistics=statistics, **tensors,
        )  # fmt: skip
        texts = (row.id, row.task, row.digest)
        require(all(isinstance(text, str) for text in texts), "id, task and digest must be texts")
        require(
            type(row.tokens) is int and 0 < row.tokens <= MAX_TOKENS,
            f"tokens must be a number from 1 to {MAX_TOKENS:,}, found {row.tokens!r}",
        )
        for name in ("vision_tokens", "context_tokens"):
            count = getattr(row, name)
            require(
                type(count) is int and 0 <= count <= row.tokens,
                f"{name} must be a number from 0 to {row.tokens}, found {count!r}",
            )
        require(file.name == _file_name(row.id), "the file's name does not go with its sample")
        return row
    except _UNREADABLE as error:
        raise UsageError(
            f"{file} is not a sound row ({error}): delete it, and run `hkvprof calibrate` with the "
            "same options again"
        ) from None


def read_tables(path: Path, conditions: Conditions) -> tuple[FittedTables, str]:
    """The index tables of a folder and the digest of the samples they were fitted on."""
    try:
        about, tensors = _read(path / INDEX)
        tables = FittedTables.take(tuple(about["sizes"]), tensors)
        require(not tensors, f"unknown tensors {sorted(tensors)}")
        tables.check(conditions.grid, conditions.strategies)
        return tables, str(about["fitted_on"])
    except _UNREADABLE as error:
        raise UsageError(f"{path / INDEX} cannot be read ({error}): measure again") from None


def _read(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    container = read_container(file, _MOST_BYTES)
    return strict_json.loads(container.metadata[_KEY]), container.tensors()
