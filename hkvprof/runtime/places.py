"""Where in the conversation the tokens of a segment stand: what masks are applied by.

Dynamic heads need no list: their layout says it. Static heads note the positions they kept, on the
host: 4 bytes per token and head, beside lengths and offsets, which receipts do not count either.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.runtime.copies import NeverCopied
from hkvprof.runtime.host import DynamicHead


class Places(NeverCopied):
    """Ascending positions of the tokens that a static segment kept. Never changes once made."""

    def __init__(self, among: NDArray[np.int32], kept: Int[Tensor, " kept"]) -> None:
        """Tokens number `kept` among those at the positions `among`.

        A choice made on a device is copied without waiting, and waited for when it is asked for.
        """
        self._among: NDArray[np.int32] = among
        self._kept: Tensor | None = None
        self._written: torch.cuda.Event | None = None
        if not kept.is_cuda:
            self._among = among[np.from_dlpack(kept)]
            return
        self._kept = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
        self._kept.copy_(kept, non_blocking=True)
        self._written = torch.cuda.Event()
        self._written.record()

    def read(self) -> NDArray[np.int32]:
        """The positions."""
        if self._kept is not None and self._written is not None:
            self._written.synchronize()
            self._among = self._among[self._kept.numpy()]
            self._kept = self._written = None
        return self._among

    def before(self, limit: int) -> Places:
        """Without positions from `limit` on."""
        known = self.read()
        return Places(known, torch.arange(int((known < limit).sum())))


def span(first: int, end: int) -> NDArray[np.int32]:
    """Positions from `first` up to `end`."""
    return np.arange(first, end, dtype=np.int32)


def dynamic_positions(
    head: DynamicHead, start: int, stored: int, resident: bool
) -> Int[Tensor, " tokens"]:
    """Positions of a dynamic head's tokens, on its device; its row begins at `start`.

    In the order of its segment, of `stored` tokens, where `resident`; else in that of all its
    tokens (`DynamicHead.all_tokens`).
    """
    layout, slots = head.layout, head.slots.long()
    moved = layout.items * layout.chunk
    whole = layout.sinks + moved + layout.recent
    tail = stored - layout.sinks - layout.recent - layout.hot * layout.chunk

    def count(first: int, tokens: int) -> Tensor:
        return torch.arange(first, first + tokens, device=slots.device)

    if resident:
        items = (slots[:, None] * layout.chunk + count(0, layout.chunk)).flatten()
    else:
        items = count(0, moved)
    parts = [
        count(0, layout.sinks),
        count(layout.sinks + moved, layout.recent),
        layout.sinks + items,
        count(whole, tail),
    ]
    return start + torch.cat(parts)
