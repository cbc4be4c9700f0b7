"""What the Triton kernels share. Importing this module imports triton: see `kernels.for_device`.

Under Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported) the kernels run on
CPU tensors. There a product of bfloat16 tiles returns garbage and a conversion to bfloat16 cuts
bits off, so that UPCAST multiplies in float32 and rounds by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from hkvprof.runtime.kernels.interface import DynamicSegment
from hkvprof.selection.index import MeanIndex, MinMaxIndex

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_DOT = 16
"""Least rows, columns and depth of a tl.dot."""


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, UPCAST: tl.constexpr) -> tl.tensor:
    """Product of two tiles, accumulated in float32; float32 tiles are not cut to TF32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x: tl.tensor, DTYPE: tl.constexpr, UPCAST: tl.constexpr) -> tl.tensor:
    """float32 as DTYPE, rounded to the nearest, of equals the even one."""
    if UPCAST and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


FIELDS = tl.constexpr(23)
"""Columns of a descriptor: what the kernels know about a dynamic head, as int64, addresses too."""
SEGMENT = tl.constexpr(0)
ITEMS = tl.constexpr(1)
HOT = tl.constexpr(2)
HOT_START = tl.constexpr(3)
PICKED = tl.constexpr(4)
"""Items that get an exact score; 0: the estimated scores stay."""
BASE = tl.constexpr(5)
"""Where the head's items begin in scratch that holds one entry per item of all heads."""
PARTS = tl.constexpr(6)
"""Where its partial sums begin in scratch that holds one entry per block of items."""
BLOCK_ITEMS = tl.constexpr(7)
"""Items of such a block."""
FIRST = tl.constexpr(8)
"""Mean or smallest keys, or codes."""
SECOND = tl.constexpr(9)
"""Largest keys."""
PROJECTION = tl.constexpr(10)
CODEBOOK = tl.constexpr(11)
CHANNELS = tl.constexpr(12)
SLOTS = tl.constexpr(13)
HOT_SCORE = tl.constexpr(14)
HOST = tl.constexpr(15)
BOUNDS = tl.constexpr(16)
"""Address of pairs of int64: the first channel of every code, and one past its last."""
ACTIVE = tl.constexpr(17)
"""0: this launch leaves the head as it is. Written on the device (Retrieval.step_some)."""
FRESH = tl.constexpr(18)
"""Most items that become hot in a step."""
ROWS = tl.constexpr(19)
"""Address of hot slots in fewer bits."""
MEAN = tl.constexpr(20)
"""Of tokens in fewer bits."""
HOT_BITS = tl.constexpr(21)
"""Of hot slots; 0: they are exact, in the storage."""
HOST_BITS = tl.constexpr(22)
"""Of items on the host, likewise."""


@triton.jit
def field(heads: tl.tensor, head: tl.tensor, NUMBER: tl.constexpr) -> tl.tensor:
    """One number of a head's descriptor."""
    return tl.load(heads + head * FIELDS + NUMBER)


@triton.jit
def idle(heads: tl.tensor, head: tl.tensor) -> tl.tensor:
    """Whether a launch leaves this head as it is."""
    return field(heads, head, ACTIVE) == 0


@triton.jit
def small(heads: tl.tensor, head: tl.tensor, NUMBER: tl.constexpr) -> tl.tensor:
    """One number that fits into 32 bits."""
    return field(heads, head, NUMBER).to(tl.int32)


@triton.jit
def address(
    heads: tl.tensor, head: tl.tensor, NUMBER: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """One address, of elements of this type; a multiple of 16, so that reads can be wide."""
    return tl.multiple_of(field(heads, head, NUMBER).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def row_address(heads: tl.tensor, head: tl.tensor, NUMBER: tl.constexpr) -> tl.tensor:
    """One address of rows of bytes; a multiple of 4."""
    return tl.multiple_of(field(heads, head, NUMBER).to(tl.pointer_type(tl.uint8)), 4)


INTERPRETED = not isinstance(dot, triton.runtime.JITFunction)
"""Whether this process runs kernels in Triton's interpreter."""


def padded(number: int, least: int = LEAST_DOT) -> int:
    """The least power of two that is not below `number` nor `least`."""
    return max(least, 1 << (number - 1).bit_length())


def blocks(total: int, block: int) -> int:
    """How many blocks cover `total`; at least one, since a grid must not be empty."""
    return max(1, -(-total // block))


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
