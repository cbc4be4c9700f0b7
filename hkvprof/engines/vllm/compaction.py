"""At the end of a prompt: choose a head's tokens, and move them into the blocks that stay.

What stays is chosen by the functions of `selection`, on keys and values as they lie in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hkvprof.engines.vllm.held import HeldPrompt
from hkvprof.engines.vllm.seams import ops
from hkvprof.heads import KeepRule, Strategy
from hkvprof.profile.pages import PageFormat
from hkvprof.selection.static import rank_tokens, select_tokens, window_attention

BITS = {2: torch.int16, 4: torch.int32}
"""By its bytes, what stands for an element of pages whose bits are not to be touched."""


@dataclass(frozen=True)
class Pages:
    """One head's pages on the CPU, [blocks, 1, size, 2 dim], packed by the kernel for `isa`."""

    cache: Tensor
    isa: str

    @property
    def size(self) -> int:
        """Tokens of one block."""
        return int(self.cache.shape[2])

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Keys and values, as vLLM's kernel divides every page."""
        blocks, heads, size, width = self.cache.shape
        key, value = self.cache.view(blocks, heads, 2 * size, width // 2).chunk(2, dim=2)
        return key, value

    def read(self, blocks: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """Keys and values [n * size, dim] of these blocks, in order of their tokens."""
        dim = self.cache.shape[3] // 2
        places = packing(self.size, dim, self.cache.dtype, self.isa)
        key, value = (
            half[blocks].reshape(len(blocks), -1)[:, place].view(-1, dim)
            for half, place in zip(self.halves, places, strict=True)
        )
        return key, value

    def write(self, slots: Int[Tensor, " n"], key: Tensor, value: Tensor) -> None:
        """Store keys and values [n, dim] in these slots."""
        key, value = key[:, None].contiguous(), value[:, None].contiguous()
        ops.cpu_attn_reshape_and_cache(key, value, *self.halves, slots, self.isa)

    def write_bytes(self, slots: Int[Tensor, " n"], data: UInt8[Tensor, "n bytes"]) -> None:
        """Store any bytes where these slots' keys and values lie; `read` gives them back."""
        dim = self.cache.shape[3] // 2
        kind = BITS[self.cache.element_size()]
        places = packing(self.size, dim, self.cache.dtype, self.isa)
        for half, part, place in zip(self.halves, data.view(kind).chunk(2, 1), places, strict=True):
            flat = half.view(kind).view(len(half), -1)
            flat[slots[:, None] // self.size, place.view(self.size, dim)[slots % self.size]] = part


@lru_cache
def packing(size: int, dim: int, dtype: torch.dtype, isa: str) -> tuple[Tensor, Tensor]:
    """Where the kernel puts each number of a block's keys, and of its values.

    Found out by storing numbers: the digits of their places, base 128, are exact in any dtype.
    """
    count = size * dim
    found = torch.zeros(2, count, dtype=torch.long)
    digit = 1
    while digit < count:
        source = (torch.arange(count) // digit % 128).view(size, 1, dim).to(dtype)
        pages = Pages(torch.zeros(1, 1, size, 2 * dim, dtype=dtype), isa)
        pages.write(torch.arange(size), source[:, 0], source[:, 0])
        for half, kept in zip(pages.halves, found, strict=True):
            kept += half.reshape(-1).long() * digit
        digit *= 128
    places = found.argsort(dim=1)
    assert bool((found.sort(dim=1).values == torch.arange(count)).all()), "pages are not permuted"
    return places[0], places[1]


@dataclass(frozen=True)
class HeadRule:
    """How one head chooses its tokens."""

    strategy: Strategy
    keep: KeepRule
    scaling: float
    pages: PageFormat

    def choose(
        self, query: Float[Tensor, "window group dim"], key: Float[Tensor, "tokens dim"], count: int
    ) -> Int[Tensor, " count"]:
        """The `count` tokens to keep, ascending; `query` are the prompt's last rows."""
        seen = window_attention(query.transpose(0, 1), key[None], self.scaling)
        ranking = rank_tokens(seen, self.strategy.pool, self.keep)[0]
        return select_tokens(ranking, count, self.strategy, self.keep)


@dataclass(frozen=True)
class Compacted:
    """A head's prompt that ended: the numbers of the `tokens` that were kept, ascending, and what
    the blocks that stay hold now."""

    tokens: Int[Tensor, " kept"]
    held: HeldPrompt
    blocks: Int[Tensor, " n"]
    pages: Pages

    def stored(self) -> tuple[Float[Tensor, "kept dim"], Float[Tensor, "kept dim"]]:
        """Keys and values of the kept tokens as they are attended to from now on."""
        if self.held.pages.is_exact:
            key, value = self.pages.read(self.blocks)
            return key[: len(self.tokens)], value[: len(self.tokens)]
        return self.held.restore(self.pages.read, self.blocks)


def compact(
    rule: HeadRule, pages: Pages, blocks: Tensor, query: Tensor, tokens: int, dropped: int
) -> Compacted:
    """Move what a head keeps of a prompt of `tokens` tokens behind its first `dropped` blocks, in
    fewer bits where its pages have them. `blocks` are the prompt's."""
    size, blocks = pages.size, blocks.long()
    held = HeldPrompt(rule.pages, rule.keep, tokens, dropped)
    key, value = (part[:tokens] for part in pages.read(blocks))
    chosen = rule.choose(query, key, held.kept)
    places = torch.arange(dropped * size, tokens)
    slots = blocks[places // size] * size + places % size
    if rule.pages.is_exact:
        pages.write(slots, key[chosen], value[chosen])
    else:
        data, *exact = held.pack(key, value, chosen)
        pages.write_bytes(slots[: len(data)], data)
        pages.write(slots[len(data) :], *exact)
    return Compacted(chosen, held, blocks[dropped:], pages)
