"""Which heads a launch works on, and how many programs that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from hkvprof.policy.index import MeanIndex, MinMaxIndex
from hkvprof.runtime.kernels.interface import DynamicSegment
from hkvprof.runtime.kernels.triton_common import blocks


@dataclass(frozen=True)
class Launch:
    """Heads that one launch works on: their numbers on both sides, and what they share."""

    kind: Any
    heads: tuple[DynamicSegment, ...]
    which: Int[Tensor, " n"]

    def grid(self, number: Callable[[DynamicSegment], int], block: int) -> tuple[int, int]:
        """One program per head and block."""
        return len(self.heads), blocks(max(map(number, self.heads)), block)


def items_of(head: DynamicSegment) -> int:
    """How many items it has."""
    return head.items


def picked_of(head: DynamicSegment) -> int:
    """How many items get an exact score."""
    if not head.rerank or head.hot == head.items:
        return 0
    return min(head.hot + head.rerank, head.items)


def kind_of(index: Any) -> str | int:
    """A name, or the number of codes."""
    if isinstance(index, MeanIndex):
        return "mean"
    return "minmax" if isinstance(index, MinMaxIndex) else int(index.codes.shape[1])
