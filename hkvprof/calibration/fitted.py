"""What the first pass over the samples fits: rows are measured with it, and profiles hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from hkvprof.heads import CALIBRATED, HeadGrid, Strategy
from hkvprof.profile.bounds import require
from hkvprof.profile.queries import QueryTables
from hkvprof.profile.tables import ProjectedIndexTables


@dataclass(frozen=True, eq=False)
class FittedTables:
    """Constants of the projected index, and the queries that calibrated scores ask, if any do."""

    index: ProjectedIndexTables
    queries: QueryTables | None = None

    @property
    def go_by_positions(self) -> bool:
        """Whether anything of it asks where tokens stand."""
        return self.index.pairs > 0 or self.queries is not None

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All arrays by their names in a file."""
        queries = {} if self.queries is None else self.queries.tensors()
        return {**self.index.tensors(), **queries}

    @classmethod
    def take(cls, sizes: tuple[int, ...], named: dict[str, NDArray[Any]]) -> FittedTables:
        """Move the arrays out of `named`. Raises KeyError."""
        return cls(ProjectedIndexTables.take(sizes, named), QueryTables.take(named))

    def check(self, grid: HeadGrid, strategies: tuple[Strategy, ...]) -> None:
        """Raise ProfileError unless all is sound and there that these strategies need."""
        self.index.check(grid)
        if self.queries is not None:
            self.queries.check(grid)
        asked = any(strategy.score == CALIBRATED for strategy in strategies)
        require(not asked or self.queries is not None, "calibrated scores have no queries to ask")
