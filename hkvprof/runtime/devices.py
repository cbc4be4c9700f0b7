"""Which CUDA device work goes to, where there are several; and pinned memory that it reads.

Triton launches on, and events record, the current device, which need not be the tensors'.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import UInt8
from torch import Tensor

SLAB = 256 * 2**20
"""Bytes of pinned memory that are asked for at a time; torch rounds up to powers of two."""
ALIGNED = 256
"""Bytes; parts of a slab begin at multiples of it."""


def at(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one; nothing for others."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def mark(device: torch.device) -> torch.cuda.Event:
    """An event behind all that the device's current stream was given so far."""
    with at(device):
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
    return event


class PinnedSlabs:
    """Pinned memory in large pieces that all requests share; a piece is freed with its last part.

    Pinning takes long, and torch rounds every block up to a power of two. Parts are views: a slab
    lives as long as any of them, or as it is the one that is being filled.
    """

    def __init__(self, size: int = SLAB, pinned: bool = True) -> None:
        self._size, self._pinned = size, pinned
        self._slab: Tensor | None = None
        self._used = 0

    def take(self, count: int) -> UInt8[Tensor, " count"]:
        """So many bytes; more than half a slab has memory of its own. Raises as torch does."""
        if 2 * count > self._size:
            return torch.empty(count, dtype=torch.uint8, pin_memory=self._pinned)
        if self._slab is None or self._used + count > len(self._slab):
            self._slab = torch.empty(self._size, dtype=torch.uint8, pin_memory=self._pinned)
            self._used = 0
        part = self._slab[self._used : self._used + count]
        self._used += -(-count // ALIGNED) * ALIGNED
        return part

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in a part of its own."""
        return self.take(torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)


SLABS = PinnedSlabs()
"""Of this process."""
