"""How many tokens a head's pages hold: pages are equal in bytes, tokens in fewer bits are more.

A page has room for so many tokens in the model's dtype, its slots. What a head keeps of a prompt
begins with rows of fewer bits (selection.residents), packed page by page; the last slots before
the tokens to come hold, in the model's dtype, the rows' mean, the sinks and the recent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from hkvprof.heads import EXACT_BITS, KeepRule
from hkvprof.profile.costs import quantised_bytes


@dataclass(frozen=True)
class PageFormat:
    """Pages of `size` slots for heads of `head_dim` channels, `itemsize` bytes per element, whose
    kept tokens have `bits` bits."""

    bits: int
    size: int
    head_dim: int
    itemsize: int

    @property
    def is_exact(self) -> bool:
        """Whether all tokens are in the model's dtype: each has a slot."""
        return self.bits == EXACT_BITS

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot, that is of a token in the model's dtype."""
        return 2 * self.head_dim * self.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a token in fewer bits."""
        return quantised_bytes(self.bits, self.head_dim)

    def rows_in(self, slots: int) -> int:
        """Rows that the first `slots` slots of a page have room for."""
        return slots * self.slot_bytes // self.row_bytes

    def rows(self, slots: int, keep: KeepRule) -> int:
        """Rows that fit where a prompt keeps `slots` slots."""
        pages, left = divmod(max(0, slots - exact_slots(keep)), self.size)
        return pages * self.rows_in(self.size) + self.rows_in(left)

    def tokens(self, slots: int, prompt: int, keep: KeepRule) -> int:
        """Tokens of a prompt of `prompt` tokens that fit where it keeps `slots` slots, fewer than
        it has."""
        if self.is_exact:
            return slots
        ends = keep.sinks + keep.recent
        return ends + min(prompt - ends, self.rows(slots, keep))

    def least_slots(self, keep: KeepRule) -> int:
        """Fewest slots that hold sinks, recent tokens and one more."""
        return keep.floor_tokens + (not self.is_exact)

    def enough(self, prompt: int, keep: KeepRule) -> int:
        """Fewest slots that hold every token of a prompt, in these bits."""
        if self.is_exact:
            return prompt
        pages, left = divmod(prompt - keep.sinks - keep.recent, self.rows_in(self.size))
        return exact_slots(keep) + pages * self.size - (-left * self.row_bytes // self.slot_bytes)


def exact_slots(keep: KeepRule) -> int:
    """Slots in the model's dtype beside rows: their mean, sinks and recent tokens."""
    return 1 + keep.sinks + keep.recent
