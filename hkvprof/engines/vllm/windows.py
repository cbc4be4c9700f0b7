"""The last queries of prompts that come in chunks, kept until their last chunk."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

MOST = 1024
"""Unfinished prompts whose rows are kept at a time; vLLM schedules fewer."""


@dataclass
class Windows:
    """One head's last rows of unfinished prompts, by the block that their last token lies in.

    A block may have passed to another request since: rows count only where their keys are those in
    the cache.
    """

    rows: OrderedDict[int, tuple[int, Tensor, Tensor]] = field(default_factory=OrderedDict)

    def keep(self, block: int, end: int, query: Tensor, key: Tensor) -> None:
        """Remember rows that end before token `end`: queries [n, group, dim] and keys [n, dim]."""
        self.rows.pop(block, None)
        self.rows[block] = end, query.clone(), key.clone()
        while len(self.rows) > MOST:
            self.rows.popitem(last=False)

    def join(
        self, block: int, query: Float[Tensor, "new group dim"], key: Tensor, window: int
    ) -> Float[Tensor, "rows group dim"]:
        """The last `window` queries of tokens with these keys [tokens, dim]: `query` and, where it
        is short, the rows kept under `block`."""
        new = query[-window:]
        end, old, keys = self.rows.pop(block, (0, query[:0], key[:0]))
        begin = len(key) - len(query)
        missing = min(window - len(new), len(old))
        if missing <= 0 or end != begin or not torch.equal(key[end - len(keys) : end], keys):
            return new
        return torch.cat([old[len(old) - missing :], new])
