"""Queues for `runtime.retrieval` where there is no device: two orders in which work may be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


class InOrder:
    """One queue: what goes aside runs at once."""

    def join(self) -> None:
        """There is nothing to wait for."""

    def aside(self, work: Callable[[], None]) -> None:
        work()

    def uses(self, tensors: Sequence[Tensor]) -> None:
        """There is one queue alone."""


class Late:
    """A second queue that is as slow as can be: its work happens when somebody must wait for it."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def join(self) -> None:
        for work in self.waiting:
            work()
        self.waiting.clear()

    def aside(self, work: Callable[[], None]) -> None:
        self.waiting.append(work)

    def uses(self, tensors: Sequence[Tensor]) -> None:
        assert all(isinstance(tensor, Tensor) for tensor in tensors)
