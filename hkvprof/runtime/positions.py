"""Which positions the model's rotary embeddings gave to a conversation's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hkvprof.selection.rotary import Positions


@dataclass
class SeenPositions:
    """Of all rows, as passes of several tokens told them; kept on the host.

    Tokens that nobody told of count on from those before them, as decoding does, and without any
    from 0 after a row's padding. `before` is how many tokens the running pass follows.
    """

    before: int = 0
    told: list[tuple[int, Int[Tensor, "axes rows tokens"]]] = field(default_factory=list)
    """First token of a pass, padding included, and what it was told."""
    known: dict[int, Positions] = field(default_factory=dict)
    """Of a row's tokens, all that were there when a layer last asked."""

    def see(self, positions: Int[Tensor, "axes some tokens"], rows: int) -> None:
        """The running pass's, of all its rows at once or one by one; of a step they are not read,
        so that nobody waits for the device."""
        told = [(begin, one[..., : self.before - begin]) for begin, one in self.told]
        self.told = [(begin, one) for begin, one in told if one.shape[-1] and begin < self.before]
        if positions.shape[-1] == 1 and self.told:
            return
        own = positions.detach().to("cpu", torch.int32)
        self.told.append((self.before, own.expand(-1, rows, -1).clone()))

    def of(
        self, row: int, start: int, seen: int, begin: int, count: int, device: torch.device
    ) -> Positions:
        """Of `count` tokens of a row from its token number `begin` on, where the row begins after
        `start` of `seen` positions."""
        known = self.known.get(row)
        if known is None or known.count != seen - start:
            known = Positions.of(self._whole(row, start, seen))
            if known.told is not None:
                known = replace(known, told=known.told.to(device))
            self.known[row] = known
        return known.part(begin, count)

    def next_of(self, row: int, start: int, seen: int) -> int:
        """Of the token that follows `seen` positions of a row that begins after `start` of them:
        above the last one's, on the axis that is ahead (`Positions.next`)."""
        for begin, one in reversed(self.told):
            if begin < seen:
                last = min(seen - begin, one.shape[-1]) - 1
                return int(one[:, row, last].max()) + seen - begin - last
        return seen - start

    def _whole(self, row: int, start: int, seen: int) -> Int[Tensor, "axes tokens"]:
        """Positions of all tokens of a row."""
        axes = max((len(one) for _, one in self.told), default=1)
        whole = torch.empty(axes, 0, dtype=torch.int32)
        for begin, one in (*self.told, (seen, torch.empty(axes, row + 1, 0, dtype=torch.int32))):
            whole = _counting_on(whole, begin - start)
            skipped = max(0, start - begin)
            whole = torch.cat([whole, one[:, row, skipped : seen - begin]], dim=1)
        return whole

    @property
    def nbytes(self) -> int:
        """Device bytes of positions that do not count up; rows of a beam share them."""
        told = [one.told for one in self.known.values() if one.told is not None]
        sizes = {one.data_ptr(): one.untyped_storage().nbytes() for one in told}
        return sum(sizes.values())

    def take_rows(self, rows: Sequence[int]) -> None:
        """Reorder, drop or repeat batch rows."""
        self.told = [(begin, one[:, list(rows)]) for begin, one in self.told]
        old = self.known
        self.known = {now: old[row] for now, row in enumerate(rows) if row in old}

    def __deepcopy__(self, memo: dict[int, Any]) -> SeenPositions:
        """Tensors never change, and are shared."""
        return SeenPositions(self.before, list(self.told), dict(self.known))


def _counting_on(positions: Int[Tensor, "axes tokens"], until: int) -> Int[Tensor, "axes until"]:
    """With more behind them, up to `until` of them in all, each one above the one before."""
    count = until - positions.shape[1]
    if count <= 0:
        return positions
    last = positions[:, -1:] if positions.shape[1] else positions.new_full((len(positions), 1), -1)
    more = last + torch.arange(1, count + 1, dtype=torch.int32)
    return torch.cat([positions, more], dim=1)
