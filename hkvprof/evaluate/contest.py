"""Methods of a comparison as makers of compressed caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hkvprof.evaluate.baselines.base import Prompt
from hkvprof.evaluate.baselines.registry import find
from hkvprof.evaluate.baselines.session import applied, decide, fill
from hkvprof.evaluate.plan import Entry
from hkvprof.evaluate.prefill import Prefill
from hkvprof.evaluate.records import OURS
from hkvprof.profile.budgets import Budget
from hkvprof.profile.record import Profile
from hkvprof.runtime import CompressedCache, apply

MIN_TOKENS = 64
"""Fewer than `apply` asks for: here it is quality that counts, not time."""


@dataclass
class Caches:
    """Makes caches that hold one prompt, compressed by one entry; `seconds` it took to decide."""

    make: Callable[[], CompressedCache]
    seconds: float

    def __call__(self) -> CompressedCache:
        """A new cache that holds the prompt, compressed by this entry."""
        return self.make()


class Contest:
    """All entries' ways to compress, for one model and profile."""

    def __init__(self, model: Any, profile: Profile, seed: int) -> None:
        self.model, self.profile, self.seed = model, profile, seed
        self._memos: dict[int, dict[str, tuple[Any, float]]] = {}

    def forget(self) -> None:
        """Before the next sample: what methods remembered of this one's prompts goes."""
        self._memos.clear()

    @contextmanager
    def open(self, entry: Entry, prefill: Prefill) -> Iterator[Caches]:
        """Within: the model serves caches of this entry. Raises HkvError where it cannot."""
        if entry.method == OURS:
            with apply(
                self.model, self.profile, budget=entry.budget, min_tokens=MIN_TOKENS
            ) as handle:

                def ours() -> CompressedCache:
                    cache = handle.new_cache(prefill.tokens)
                    prefill.fill(cache)
                    return cache

                yield Caches(ours, 0.0)
            return
        method, prompt = find(entry.method), self._prompt(entry, prefill)
        decision = decide(method, prompt)
        with applied(self.model, method, decision.share, self.profile) as handle:

            def theirs() -> CompressedCache:
                cache = handle.new_cache(prefill.tokens)
                fill(cache, prefill, decision)
                return cache

            yield Caches(theirs, decision.seconds)

    def _prompt(self, entry: Entry, prefill: Prefill) -> Prompt:
        dense = sum(call.key.nbytes + call.value.nbytes for call in prefill.calls)
        share = Budget.parse(entry.budget).resolve(prefill.tokens, dense)
        memo = self._memos.setdefault(id(prefill), {})
        return Prompt(self.model, prefill, share, self.profile, self.seed, memo)
