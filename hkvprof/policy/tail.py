"""How far a row may grow before it is compressed again (docs/method.md; plain numbers).

Tokens that came since the last compression, the tail, are kept whole and are part of the budget.
All figures are tokens per head, a mean over all heads of a row, with indexes and slot maps turned
into tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

OVER = 0.05
"""What may be held over the budget, as a share of it."""
LEAST = 128
"""Where the budget is worth fewer tokens per head, the same share of this many: 6.4 tokens."""
RESERVE = 1 / 16
"""Most of the budget that a later compression leaves free for tokens to come."""
LEAST_ROOM = 4
"""Tokens between two compressions at least, also where indexes alone exceed the budget."""
QUIET = 1 << 30
"""Tokens without an end."""


@dataclass(frozen=True)
class Worth:
    """What a budget is worth: `now`, and `slope` more with every further token of the row."""

    now: float
    slope: float = 0.0

    def at(self, tokens: int) -> float:
        """After so many more tokens."""
        return self.now + self.slope * tokens

    def limit(self, tokens: int) -> float:
        """What may be held then."""
        return self.at(tokens) + OVER * max(self.at(tokens), LEAST)

    def room(self, held: float, every: int) -> int:
        """Tokens that may come, at most `every`, where `held` are held now.

        After n of them held + n <= limit(n), unless so much is held that not even LEAST_ROOM fits.
        """
        relative = _steps((1 + OVER) * self.now - held, 1 - (1 + OVER) * self.slope)
        absolute = _steps(self.now + OVER * LEAST - held, 1 - self.slope)
        return min(every, max(LEAST_ROOM, relative, absolute))

    def spare(self, held: float, tokens: int) -> int:
        """Tokens for which there may be memory after so many, without waiting for the budget to
        grow."""
        return max(0, math.floor(self.limit(tokens) - held - tokens + 1e-9))

    def target(self, every: int) -> float:
        """What a later compression should leave held at most, so that `every` tokens have room; it
        takes no more than RESERVE of the budget for them."""
        return max((1 - RESERVE) * self.now, self.limit(every) - every)


def _steps(left: float, each: float) -> int:
    if left < -1e-9:
        return 0
    return QUIET if each <= 0 else min(QUIET, math.floor(left / each + 1e-9))
