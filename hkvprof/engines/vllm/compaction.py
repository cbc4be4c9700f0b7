"""At the end of a prompt: choose a head's tokens, and move them into the blocks that stay.

What stays is chosen by the functions of `selection`, on keys and values as they lie in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.engines.vllm.seams import ops
from hkvprof.heads import KeepRule, Strategy
from hkvprof.selection.static import rank_tokens, select_tokens, window_attention


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

    def choose(
        self, query: Float[Tensor, "window group dim"], key: Float[Tensor, "tokens dim"], count: int
    ) -> Int[Tensor, " count"]:
        """The `count` tokens to keep, ascending; `query` are the prompt's last rows."""
        seen = window_attention(query.transpose(0, 1), key[None], self.scaling)
        ranking = rank_tokens(seen, self.strategy.pool, self.keep)[0]
        return select_tokens(ranking, count, self.strategy, self.keep)


def compact(
    rule: HeadRule, pages: Pages, blocks: Tensor, query: Tensor, tokens: int, dropped: int
) -> Int[Tensor, " kept"]:
    """Move what a head keeps of a prompt of `tokens` tokens behind its first `dropped` blocks.

    `blocks` are the prompt's. Returns the numbers of the tokens that were kept.
    """
    size, blocks = pages.size, blocks.long()
    key, value = (part[:tokens] for part in pages.read(blocks))
    chosen = rule.choose(query, key, tokens - dropped * size)
    places = torch.arange(dropped * size, tokens)
    slots = blocks[places // size] * size + places % size
    pages.write(slots, key[chosen], value[chosen])
    return chosen
