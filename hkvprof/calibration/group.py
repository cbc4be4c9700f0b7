"""The processes that measure together: what each one does, asks and tells. One alone is a group."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from hkvprof.errors import HkvError

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

    def share(self, items: Sequence[T]) -> list[T]:
        """What this process is to measure."""
        return list(items if self.in_step else items[self.rank :: self.size])

    def check(self) -> None:
        """Raise ElsewhereError when another process has failed."""

    def from_leader(self, make: Callable[[], T]) -> T:
        """What `make` returns in the leading process, in all of them; it runs there alone."""
        return make()

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
