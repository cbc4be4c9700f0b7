"""From which prompt length on compression does not slow decoding down."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from hkvprof.bench.methods import Kind, Method
from hkvprof.bench.records import Context, Crossover

SHORTEST, LONGEST = 64, 4096


def crossover_contexts(limit: int | None) -> tuple[int, ...]:
    """Prompt lengths in tokens, doubling, capped by the model's limit."""
    lengths = [SHORTEST]
    while lengths[-1] < LONGEST:
        lengths.append(2 * lengths[-1])
    return tuple(takewhile(lambda tokens: limit is None or tokens <= limit, lengths))


def find_crossovers(contexts: Sequence[Context], budgets: Sequence[str]) -> tuple[Crossover, ...]:
    """Per budget, the shortest context from which on `profile` is not slower and takes fewer bytes,
    there and at all longer contexts measured."""
    return tuple(_find(contexts, budget) for budget in budgets)


def _find(contexts: Sequence[Context], budget: str) -> Crossover:
    pays = takewhile(lambda context: _saved(context, budget) is not None, reversed(contexts))
    best = next(reversed(list(pays)), None)
    saved = None if best is None else _saved(best, budget)
    return Crossover(budget, None if best is None else best.tokens, saved)


def _saved(context: Context, budget: str) -> int | None:
    """Bytes saved at a context; None where ours is slower, saves nothing or did not run."""
    ours = context.row(Method(Kind.PROFILE, budget).name)
    dense = context.row(Method(Kind.DENSE).name)
    if ours is None or dense is None or ours.step_ms is None or dense.step_ms is None:
        return None
    saved = (dense.resident_bytes or 0) - (ours.resident_bytes or 0)
    return saved if ours.step_ms <= dense.step_ms and saved > 0 else None
