"""A method's selection becomes a compressed cache; its bytes are checked against its share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import CompressionError, UsageError
from hkvprof.evaluate.baselines.base import Baseline, Choice, Kept, PromptView, Selection, find
from hkvprof.evaluate.counting import Widened, count_bytes
from hkvprof.evaluate.prefill import Prefill
from hkvprof.heads import EXACT_BITS, HeadType, Strategy
from hkvprof.profile.costs import QUANTISED_END_BYTES
from hkvprof.profile.record import Profile
from hkvprof.runtime import CompressedCache, Handle, apply
from hkvprof.runtime.packing import Packed
from hkvprof.runtime.plan import HeadPlan

_SEGMENT_BYTES = 8
"""Per head: the runtime's note of where its tokens lie; those in fewer bits have one more."""
_PRUNED = Strategy(HeadType.STATIC)


@dataclass(frozen=True)
class TimedSelection:
    """What a method decided for one prompt and share, and the time it took."""

    method: Baseline
    share: float
    selection: Selection
    seconds: float
    itemsize: int

    @property
    def saved(self) -> int:
        """Bytes by which decoded rows exceed the format in which the method keeps them."""
        rows = [c for layer in self.selection for c in layer if isinstance(c, Kept)]
        return sum(
            (row.key.numel() + row.value.numel()) * self.itemsize - row.stored
            for row in rows
            if row.stored is not None
        )


def decide(method: Baseline, prompt: PromptView) -> TimedSelection:
    """Let a method select. The model must not have a profile applied. Raises UsageError."""
    if method.needs_profile:
        prompt.need_profile(method.name)
    if not 0 < prompt.share < 1:
        raise UsageError(f"{method.name}: a share lies between 0 and 1, found {prompt.share}")
    prompt.borrowed_seconds = 0.0
    began = time.perf_counter()
    selection = method.select(prompt)
    seconds = time.perf_counter() - began + prompt.borrowed_seconds
    grid = prompt.grid
    assert [len(layer) for layer in selection] == [grid.kv_heads] * grid.layers, method.name
    return TimedSelection(method, prompt.share, selection, seconds, prompt.itemsize)


def applied(model: Any, method: Baseline, share: float, profile: Profile | None) -> Handle:
    """The runtime on the model, with the method's keep rule; a context manager."""
    base = profile or uniform_profile(model)
    mine = base if method.keep is None else replace(base, keep=method.keep)
    return apply(
        model, mine, budget=share, min_tokens=1, compress_every=0,
        smoothing=method.smoothing,
    )  # fmt: skip


def fill(cache: CompressedCache, prefill: Prefill, selected: TimedSelection) -> None:
    """Put what was selected into a new cache. Raises CompressionError where it is too much."""
    planner = cache.conversation.planner
    fixed = planner.profile.keep, planner.options.slot_bytes
    widened = Widened.to_fit(prefill, *fixed, selected.itemsize)
    plans = [tuple(widened.plan(_plan(choice)) for choice in layer) for layer in selected.selection]
    given = [
        {
            head: Packed(choice.key, choice.value, selected.method.name)
            for head, choice in enumerate(layer)
            if isinstance(choice, Kept)
        }
        for layer in selected.selection
    ]
    prefill.fill_with(cache, plans, given)
    held = count_bytes(cache, selected.saved, selected.itemsize)
    few = [plan.strategy.resident_bits < EXACT_BITS for layer in plans for plan in layer]
    notes = _SEGMENT_BYTES * len(few) + QUANTISED_END_BYTES * sum(few)
    if held.resident > selected.share * held.dense + notes:
        raise CompressionError(
            f"{selected.method.name} keeps {held.resident} bytes of {held.dense}: more than its "
            f"share of {selected.share}"
        )


def _plan(choice: Choice) -> HeadPlan:
    return HeadPlan(_PRUNED, 0.0) if isinstance(choice, Kept) else choice


@contextmanager
def compress(
    model: Any,
    prefill: Prefill,
    name: str,
    share: float,
    profile: Profile | None = None,
    seed: int = 0,
) -> Iterator[CompressedCache]:
    """Within: a cache that holds what the baseline `name` keeps of a captured prompt.

    `share` is the all-in share of dense bytes. Raises UsageError, CompressionError.
    """
    method = find(name)
    selected = decide(method, PromptView(model, prefill, share, profile, seed))
    with applied(model, method, share, profile) as handle:
        cache = handle.new_cache(prefill.tokens)
        fill(cache, prefill, selected)
        yield cache
