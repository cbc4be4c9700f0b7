"""The shortest prompts that a profile can plan at its own budget (numpy alone)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hkvprof.errors import BudgetError

Ask = Callable[[float, int], object]
"""From a share and a prompt's tokens to a plan; raises BudgetError where there is none."""
_MOST = 1 << 20
_STEP = 0.01


@dataclass(frozen=True)
class Reach:
    """`shortest` prompt from which on all can be planned at `budget`, in tokens, None where not
    even the longest looked at can; `calibrated` is the shortest of the calibration, which needs a
    budget of `needed` (None where no share but the whole does)."""

    budget: float
    shortest: int | None
    calibrated: int
    needed: float | None

    @property
    def covers_calibration(self) -> bool:
        """Whether the prompts that the profile was made from can be planned."""
        return self.shortest is not None and self.shortest <= self.calibrated


def find_reach(ask: Ask, budget: float, calibrated: int, ends: int, chunks: Sequence[int]) -> Reach:
    """Search by bisection.

    What does not fill a chunk stays resident beside the `ends` (sinks and recent tokens): of each
    of the `chunks` the next length that leaves most has to be possible, and then all between are.
    """

    def possible(share: float, tokens: int) -> bool:
        try:
            ask(share, tokens)
            for chunk in chunks:
                ask(share, tokens + (chunk - 1 - tokens + ends) % chunk)
        except BudgetError:
            return False
        return True

    low, high = 0, 1
    while high <= _MOST and not possible(budget, high):
        low, high = high, 2 * high
    while high <= _MOST and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(budget, middle) else (middle, high)
    shortest = high if high <= _MOST else None
    if shortest is not None and shortest <= calibrated:
        return Reach(budget, shortest, calibrated, budget)
    shares = (step * _STEP for step in range(1, int(1 / _STEP)))
    needed = next((s for s in shares if s > budget and possible(s, calibrated)), None)
    return Reach(budget, shortest, calibrated, needed)
