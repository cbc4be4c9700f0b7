"""What a head keeps in fewer bits, as slots of its pages, and attention to it, page by page.

Bytes of rows fill the slots from the first kept page on (profile.pages); their mean and the tokens
in the model's dtype come last. Rows and means are those of `selection.residents`. Knows nothing of
vLLM: pages are read by a function that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hkvprof.heads import KeepRule
from hkvprof.profile.pages import PageFormat, exact_slots
from hkvprof.selection.residents import Residents, RowFormat, rotate

AT_ONCE = 8
"""Pages that are read and decoded at a time: attention to any context takes no more memory."""
ReadPages = Callable[[Int[Tensor, " n"]], tuple[Tensor, Tensor]]
"""Keys and values [n * size, dim] in the slots of blocks of these numbers, in order."""


@dataclass(frozen=True)
class HeldPrompt:
    """One head's prompt of `tokens` tokens, of which `dropped` whole blocks are free: the others'
    slots hold sinks, recent tokens and, in fewer bits, those that were chosen between them."""

    pages: PageFormat
    keep: KeepRule
    tokens: int
    dropped: int

    @property
    def slots(self) -> int:
        """Slots that the prompt keeps."""
        return self.tokens - self.dropped * self.pages.size

    @property
    def kept(self) -> int:
        """Tokens that it keeps."""
        return self.pages.tokens(self.slots, self.tokens, self.keep)

    @property
    def rows(self) -> int:
        """Those of them in fewer bits."""
        return self.kept - self.keep.sinks - self.keep.recent

    @property
    def first_exact(self) -> int:
        """The slot of the mean; what is in the model's dtype follows."""
        return self.slots - exact_slots(self.keep)

    def pack(
        self,
        key: Float[Tensor, "tokens dim"],
        value: Float[Tensor, "tokens dim"],
        chosen: Int[Tensor, " kept"],
    ) -> tuple[UInt8[Tensor, "first_exact slot_bytes"], Tensor, Tensor]:
        """Bytes of the slots before the mean; keys and values of it and of the exact tokens."""
        sinks, recent = self.keep.sinks, self.keep.recent
        middle = slice(sinks, len(key) - recent)
        few = chosen[sinks : len(chosen) - recent]
        held = Residents.around(key[middle], value[middle], self.pages.bits)
        rows = held.append(key[few], value[few]).rows
        ends = torch.cat([chosen[:sinks], chosen[len(chosen) - recent :]])
        exact = [
            torch.cat([mean[None], part[ends]])
            for mean, part in zip(held.mean, (key, value), strict=True)
        ]
        return self._paged(rows), exact[0], exact[1]

    def _paged(self, rows: UInt8[Tensor, "rows row_bytes"]) -> Tensor:
        """Rows page by page, each page's bytes filled up with zeros."""
        page, each = self.pages, self.pages.rows_in(self.pages.size)
        parts = [
            F.pad(one.reshape(-1), (0, page.size * page.slot_bytes - one.numel()))
            for one in rows.split(each)
        ]
        whole = torch.cat(parts).view(-1, page.slot_bytes)
        missing = self.first_exact - len(whole)
        return F.pad(whole, (0, 0, 0, max(0, missing)))[: self.first_exact]

    def residents(
        self, read: ReadPages, blocks: Int[Tensor, " n"], mean: Float[Tensor, "2 dim"]
    ) -> Iterator[Residents]:
        """Its rows, AT_ONCE pages at a time; `blocks` are the kept ones."""
        page = self.pages
        kind, each = RowFormat(page.bits, page.head_dim), page.rows_in(page.size)
        for first in range(0, -(-self.rows // each), AT_ONCE):
            some = blocks[first : first + AT_ONCE]
            slots = torch.cat(read(some), dim=1).view(torch.uint8)
            flat = slots.view(len(some), -1)[:, : each * page.row_bytes]
            rows = flat.reshape(-1, page.row_bytes)[: self.rows - first * each]
            yield Residents(kind, mean, rows)

    def mean(self, read: ReadPages, blocks: Int[Tensor, " n"]) -> Float[Tensor, "2 dim"]:
        """The mean that was taken off its rows."""
        block, slot = divmod(self.first_exact, self.pages.size)
        return torch.stack([part[slot] for part in read(blocks[block : block + 1])])

    def exact(
        self, read: ReadPages, blocks: Int[Tensor, " n"], seen: int
    ) -> Iterator[tuple[Tensor, Tensor, range]]:
        """Keys and values in the model's dtype up to token `seen`, AT_ONCE pages at a time, with
        their places in the sequence; what the prompt keeps stands at its end."""
        size, begin = self.pages.size, self.first_exact + 1
        end = seen - self.dropped * size
        for first in range(begin // size, -(-end // size), AT_ONCE):
            start = first * size
            own = slice(max(begin - start, 0), min(end - start, AT_ONCE * size))
            key, value = (part[own] for part in read(blocks[first : first + AT_ONCE]))
            places = self.dropped * size + start + own.start
            yield key, value, range(places, places + len(key))

    def restore(
        self, read: ReadPages, blocks: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "kept dim"], Float[Tensor, "kept dim"]]:
        """Keys and values as they are attended to, in order of position."""
        mean = self.mean(read, blocks)
        rows = [one.decode() for one in self.residents(read, blocks, mean)]
        ends = [one[:2] for one in self.exact(read, blocks, self.tokens)]
        sinks = self.keep.sinks
        made = []
        for number in (0, 1):
            end = torch.cat([one[number] for one in ends])
            made.append(torch.cat([end[:sinks], *(one[number] for one in rows), end[sinks:]]))
        return made[0], made[1]


@dataclass
class PartialSoftmax:
    """Attention of queries [rows, dim] to tokens that come in parts: the largest logits, sums of
    weights and weighted values so far (Milakov and Gimelshein, arXiv 1805.02867)."""

    most: Float[Tensor, " rows"]
    total: Float[Tensor, " rows"]
    values: Float[Tensor, "rows dim"]

    @classmethod
    def of(cls, rows: int, dim: int) -> PartialSoftmax:
        """Of no token yet."""
        return cls(torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows, dim))

    def add(self, logits: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens"]:
        """Make room for tokens with these logits; returns their weights, to be multiplied by their
        values and added to `values`."""
        most = torch.maximum(self.most, logits.amax(dim=1))
        shrink = (self.most - most).exp().nan_to_num(0.0)
        weights = (logits - most[:, None]).exp()
        self.values *= shrink[:, None]
        self.total = self.total * shrink + weights.sum(dim=1)
        self.most = most
        return weights


def attend(
    held: HeldPrompt, read: ReadPages, blocks: Int[Tensor, " n"], query: Tensor, first: int,
    scaling: float,
) -> Float[Tensor, "queries group dim"]:  # fmt: skip
    """Attention of queries [queries, group, dim], which stand at token `first` and after it, to the
    kept tokens and those since; `blocks` are the kept ones and those since. float32.

    Keys and values in fewer bits are never turned back: queries are turned instead, and outputs.
    """
    count, group, dim = query.shape
    flat = query.float().reshape(-1, dim)
    made, mean = PartialSoftmax.of(len(flat), dim), held.mean(read, blocks)
    turned, shift = rotate(flat), flat @ mean[0].float()
    for rows in held.residents(read, blocks, mean):
        key, value = rows.format.decode(rows.rows)
        weights = made.add((turned @ key.T + shift[:, None]) * scaling)
        made.values += rotate(weights @ value) + weights.sum(dim=1)[:, None] * mean[1].float()
    standing = torch.arange(first, first + count).repeat_interleave(group)[:, None]
    for key, value, places in held.exact(read, blocks, first + count):
        logits = (flat @ key.float().T) * scaling
        unseen = torch.arange(places.start, places.stop)[None] > standing
        weights = made.add(logits.masked_fill_(unseen, -torch.inf))
        made.values += weights @ value.float()
    return (made.values / made.total[:, None]).view(count, group, dim)
