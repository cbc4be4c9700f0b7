"""The processes that measure together: what each one does, asks and tells. One alone is a group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

from hkvprof.errors import HkvError

if TYPE_CHECKING:
    from hkvprof.calibration.fitted import FittedTables
    from hkvprof.calibration.probe import Probe
    from hkvprof.calibration.rows import RowFolder, SampleRow

T = TypeVar("T")

SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ElsewhereError(HkvError):
    """Another process of the group failed, and says why: this one has nothing to add."""


class LostError(HkvError):
    """The connection to another process ended."""


class Group:
    """One process by itself: number 0 of 1."""

    rank = 0
    size = 1
    in_step = False
    """Whether all processes measure the same samples, with one model spread over them."""

    @property
    def leads(self) -> bool:
        """Whether this process fits, merges, writes and speaks."""
        return self.rank == 0

    @property
    def part(self) -> slice:
        """Which of the samples this process is to measure."""
        return slice(None) if self.in_step else slice(self.rank, None, self.size)

    def check(self) -> None:
        """Raise ElsewhereError when another process has failed."""

    def from_leader(self, make: Callable[[], T]) -> T:
        """What `make` returns in the leading process, in all of them; it runs there alone."""
        return make()

    def index(
        self,
        folder: RowFolder | None,
        fitted_on: str,
        fit: Callable[[], FittedTables],
        wait: Callable[[Iterator[None]], None],
    ) -> FittedTables:
        """The tables of the folder; where there are none, they are fitted, and kept there.

        Fitted once: by the leading process for all, or by all in step; of processes that know of
        each other by the folder alone, by the first, for which the others `wait`. `fitted_on` as in
        RowFolder.tables, `wait` as in RowFolder.in_turn.
        """

        def known() -> FittedTables | None:
            return folder.tables(fitted_on) if folder else None

        def kept(tables: FittedTables) -> FittedTables:
            return folder.keep_tables(tables, fitted_on) if folder else tables

        def alone() -> FittedTables:
            with folder.in_turn(wait) if folder else nullcontext():
                return known() or kept(fit())

        if not self.in_step:
            return self.from_leader(lambda: known() or alone())
        tables = self.from_leader(known) or fit()
        return self.from_leader(lambda: kept(tables))

    def row(self, folder: RowFolder | None, probe: Probe, tables: FittedTables | None) -> SampleRow:
        """The sample's row in the folder; where it has none, or one of other content, one is
        measured, and added. In step, the leading process's folder counts, and it alone writes."""
        if folder is None:
            return probe.measure(tables)

        def find() -> SampleRow | None:
            return folder.find(probe.sample.id, probe.digest)

        known = self.from_leader(find) if self.in_step else find()
        if known is not None:
            return known
        row = probe.measure(tables)
        if self.leads or not self.in_step:
            folder.add(row)
        return row

    def collect(self, value: T) -> list[T]:
        """Every process's value in the leading one, by rank; empty in the others."""
        return [value]


ALONE = Group()


def is_distributed() -> bool:
    """Whether torchrun, or what sets the same variables, started this as one of several."""
    given = all(os.environ.get(name) for name in SET_BY_TORCHRUN)
    return given and os.environ["WORLD_SIZE"] != "1"


def is_follower() -> bool:
    """Whether this is one of several processes, and not the leading one."""
    return is_distributed() and os.environ["RANK"] != "0"
