"""Capacity: what a device holds, and which prompts a budget serves, by search over plans.

Pure: plans and forecasts are asked for by a function (record.Profile.allocation and plan).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hkvprof.errors import BudgetError
from hkvprof.profile.forecast import Forecast

SHARES = 10_000
"""Budgets are searched in steps of one part in so many: 0.01%."""
CONTEXT_STEP = 256
_MOST_CONTEXT, _MOST_ROWS = 2**24, 2**16

Ask = Callable[[float, int, int], Forecast]
"""(share, tokens, rows) -> Forecast; raises BudgetError where the share is too small."""


@dataclass(frozen=True)
class Room:
    """A device's memory and what is taken of it already, in bytes."""

    gpu: int
    weights: int
    reserve: int

    @property
    def left(self) -> int:
        """What keys, values and index tables may take; negative where nothing is left."""
        return self.gpu - self.weights - self.reserve


@dataclass(frozen=True)
class Fit:
    """What a device holds of `rows` prompts of `tokens` tokens (`dense_bytes`, uncompressed).

    `best` is the forecast of the largest budget that fits at its peak (of the dense cache, where
    that fits), None where none does; `smallest` that of the least budget that the profile can plan,
    None where it can plan none. `context` and `batch` are the longest prompt at `rows`, up to the
    model's `longest`, and the largest batch at `tokens` that fit at `budget`; 0 where none does.
    """

    room: Room
    tokens: int
    rows: int
    dense_bytes: int
    best: Forecast | None
    smallest: Forecast | None
    budget: float
    context: int
    batch: int
    longest: int = _MOST_CONTEXT

    @property
    def dense_fits(self) -> bool:
        """Whether nothing needs to be compressed."""
        return self.dense_bytes <= self.room.left

    @property
    def dense_context(self) -> int:
        """The longest prompt that fits uncompressed, in steps of CONTEXT_STEP."""
        longest = max(0, self.room.left) * self.tokens // self.dense_bytes
        return min(self.longest, longest // CONTEXT_STEP * CONTEXT_STEP)

    @property
    def dense_batch(self) -> int:
        """The largest batch that fits uncompressed."""
        return min(_MOST_ROWS, max(0, self.room.left) * self.rows // self.dense_bytes)


def find_fit(
    ask: Ask, tokens: int, rows: int, budget: float, room: Room, longest: int = _MOST_CONTEXT
) -> Fit:
    """Search by bisection: a fixed share of more tokens, rows or bytes needs more.

    `longest` is the model's longest context in tokens.

    Every forecast that is returned was made, and fits.
    """
    dense = ask(1.0, tokens, rows)

    def holds(share: float, tokens: int, rows: int) -> bool:
        plan = _attempt(ask, share, tokens, rows) or ask(1.0, tokens, rows)  # short prompts: dense
        return plan.peak_bytes <= room.left

    def serves(steps: int) -> bool:
        return holds(budget, min(longest, steps * CONTEXT_STEP), rows)

    steps = _last(serves, -(-longest // CONTEXT_STEP))
    smallest, best = _budgets(ask, tokens, rows, room.left)
    return Fit(
        room=room,
        tokens=tokens,
        rows=rows,
        dense_bytes=dense.dense_bytes,
        best=dense if dense.peak_bytes <= room.left else best,
        smallest=smallest,
        budget=budget,
        context=min(longest, steps * CONTEXT_STEP),
        batch=_last(lambda n: holds(budget, tokens, n), _MOST_ROWS),
        longest=longest,
    )


def _budgets(
    ask: Ask, tokens: int, rows: int, left: int
) -> tuple[Forecast | None, Forecast | None]:
    """Forecasts of the least budget, and of the largest below the whole that fits `left` bytes."""

    def plan(step: int) -> Forecast | None:
        return _attempt(ask, step / SHARES, tokens, rows)

    refused = _last(lambda step: plan(step) is None, SHARES - 1)
    smallest = plan(refused + 1) if refused + 1 < SHARES else None

    def fits(step: int) -> bool:
        found = plan(step) if step > refused else smallest
        return found is not None and found.peak_bytes <= left

    best = _last(fits, SHARES - 1) if smallest else 0
    return smallest, plan(max(best, refused + 1)) if best else None


def _attempt(ask: Ask, share: float, tokens: int, rows: int) -> Forecast | None:
    try:
        return ask(share, tokens, rows)
    except BudgetError:
        return None


def _last(holds: Callable[[int], bool], most: int) -> int:
    """The last number from 1 to `most` for which `holds`, true up to it; 0 if 1 does not hold."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


AskPlan = Callable[[float, int], object]
"""From a share and a prompt's tokens to a plan; raises BudgetError where there is none."""
_LONGEST_PROMPT = 1 << 20
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


def find_reach(
    ask: AskPlan, budget: float, calibrated: int, ends: int, chunks: Sequence[int]
) -> Reach:
    """The shortest prompt, and the budget that the calibration's own prompts need, by bisection.

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
    while high <= _LONGEST_PROMPT and not possible(budget, high):
        low, high = high, 2 * high
    while high <= _LONGEST_PROMPT and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(budget, middle) else (middle, high)
    shortest = high if high <= _LONGEST_PROMPT else None
    if shortest is not None and shortest <= calibrated:
        return Reach(budget, shortest, calibrated, budget)
    shares = (step * _STEP for step in range(1, int(1 / _STEP)))
    needed = next((s for s in shares if s > budget and possible(s, calibrated)), None)
    return Reach(budget, shortest, calibrated, needed)
