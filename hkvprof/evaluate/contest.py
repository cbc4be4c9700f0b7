"""What a comparison compares, and how each method makes its compressed caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from hkvprof.errors import UsageError
from hkvprof.evaluate.baselines.base import PromptView, baselines, find
from hkvprof.evaluate.baselines.session import applied, decide, fill
from hkvprof.evaluate.counting import CountedBytes, Widened, count_bytes
from hkvprof.evaluate.outside import OutsideEngine
from hkvprof.evaluate.prefill import Prefill
from hkvprof.evaluate.records import FULL, OURS, REGIMES, USUAL_REGIMES, Answer, TaskSet
from hkvprof.evaluate.replay import STEPS
from hkvprof.heads import HeadType, Strategy
from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.budgets import Allocation, Budget
from hkvprof.profile.record import Profile
from hkvprof.runtime import CompressedCache, apply
from hkvprof.runtime.options import Options
from hkvprof.runtime.packing import Packed
from hkvprof.runtime.plan import HeadPlan, head_plans

MIN_TOKENS = 64
"""Fewer than `apply` asks for: here it is quality that counts, not time."""
_ANY_SHARE = 0.5
"""A budget below 1 where heads have plans of their own."""


@dataclass(frozen=True)
class ProfiledModel:
    """A loaded model with its processor, a profile of it, and what a step may read under it
    (budgets.Fetch). With `engines`, by budget, hkvprof follows their plans."""

    model: Any
    processor: ChatProcessor
    profile: Profile
    fetch: str | None = None
    engines: Mapping[str, OutsideEngine] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodAtBudget:
    """One row of the comparison: hkvprof or a baseline, at one budget (as the user wrote it)."""

    method: str
    budget: str

    @property
    def is_whole(self) -> bool:
        """Whether the budget is the whole cache."""
        return Budget.parse(self.budget).share == 1


@dataclass(frozen=True)
class ComparisonPlan:
    """hkvprof and `baselines` (names) at every budget, in these regimes.

    `steps` tokens of the full cache's continuation are forced per question; `seed` is for methods
    that draw. `itemsize`: bytes that an element of keys and values counts, for budgets, shares and
    indexes alike (None: those it has). `engine` is the name of what is asked beside hkvprof at
    every budget, in processes of its own. Raises UsageError, BudgetError.
    """

    budgets: tuple[str, ...]
    baselines: tuple[str, ...] = ()
    regimes: tuple[str, ...] = USUAL_REGIMES
    steps: int = STEPS
    seed: int = 0
    itemsize: int | None = None
    engine: str = ""

    def __post_init__(self) -> None:
        unknown = [name for name in self.regimes if name not in REGIMES]
        if unknown or not self.regimes:
            raise UsageError(
                f"unknown regime {', '.join(unknown) or '(none)'}: expected some of "
                + "; ".join(f"{name} ({what})" for name, what in REGIMES.items())
            )
        for name in self.baselines:
            find(name)
        for budget in self.budgets:
            Budget.parse(budget)
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, found {self.steps}")

    @cached_property
    def entries(self) -> tuple[MethodAtBudget, ...]:
        """Rows beside the full cache; baselines have nothing to show at the whole cache."""
        ours = [MethodAtBudget(OURS, budget) for budget in self.budgets]
        theirs = [
            MethodAtBudget(name, budget) for name in self.baselines for budget in self.budgets
        ]
        engine = [MethodAtBudget(self.engine, budget) for budget in self.budgets if self.engine]
        return (*ours, *engine, *(entry for entry in theirs if not entry.is_whole))

    @property
    def public(self) -> set[str]:
        """Names of baselines that are peers' methods, not ablations."""
        return {name for name, one in baselines().items() if one.public}

    def conditions(self) -> dict[str, Any]:
        """What answers depend on, whatever rows are asked for."""
        known = {"regimes": list(self.regimes), "steps": self.steps, "seed": self.seed}
        asked = {"engine": self.engine} if self.engine else {}
        return known | {"itemsize": self.itemsize} | asked

    def fitting(self, tasks: TaskSet, given: bool) -> ComparisonPlan:
        """Without `later` where no sample has a follow-up, unless the regimes were given."""
        if given or any(sample.followups for sample in tasks.samples):
            return self
        return replace(self, regimes=tuple(r for r in self.regimes if r != "later"))

    def select(self, answers: Iterable[Answer], tasks: TaskSet) -> list[Answer]:
        """Answers to these samples by the full cache and this comparison's rows."""
        wanted = {(FULL, ""), *((entry.method, entry.budget) for entry in self.entries)}
        samples = {sample.id for sample in tasks.samples}
        return [a for a in answers if (a.method, a.budget) in wanted and a.sample in samples]


@dataclass
class Caches:
    """Makes caches that hold one prompt, compressed by one entry; `seconds` it took to decide.

    `saved` bytes are what decoded rows exceed their format by, at `itemsize` bytes an element.
    """

    make: Callable[[], CompressedCache]
    seconds: float
    saved: int
    itemsize: int

    def __call__(self) -> CompressedCache:
        """A new cache that holds the prompt, compressed by this entry."""
        return self.make()

    def count(self, cache: CompressedCache) -> CountedBytes:
        """The bytes of one of these caches, as the comparison counts them."""
        return count_bytes(cache, self.saved, self.itemsize)


class Contest:
    """All methods' ways to compress, for one model and profile."""

    def __init__(
        self,
        profiled: ProfiledModel,
        seed: int,
        itemsize: int | None = None,
        calibration: Callable[[], Sequence[Prefill]] | None = None,
    ) -> None:
        self.model, self.profile, self.seed = profiled.model, profiled.profile, seed
        self.fetch, self.engines = profiled.fetch, profiled.engines
        self.itemsize, self.calibration = itemsize, calibration
        self._memos: dict[int, dict[str, tuple[Any, float]]] = {}

    def forget(self) -> None:
        """Before the next sample: what methods remembered of this one's prompts goes."""
        self._memos.clear()

    @contextmanager
    def open(self, entry: MethodAtBudget, prefill: Prefill) -> Iterator[Caches]:
        """Within: the model serves caches of this entry. Raises HkvError where it cannot."""
        if entry.method == OURS:
            with self._ours(entry.budget, prefill) as caches:
                yield caches
            return
        method, prompt = find(entry.method), self._prompt(entry, prefill)
        selected = decide(method, prompt)
        with applied(self.model, method, selected.share, self.profile) as handle:

            def theirs() -> CompressedCache:
                cache = handle.new_cache(prefill.tokens)
                fill(cache, prefill, selected)
                return cache

            yield Caches(theirs, selected.seconds, selected.saved, selected.itemsize)

    @contextmanager
    def whole(self, prefill: Prefill) -> Iterator[CompressedCache]:
        """Within: all of a prompt in the storage of compressed caches, its last token first.

        Dense attention, computed as that of compressed caches is, in another order than usual.
        """
        heads, layers = self.profile.grid.kv_heads, len(prefill.calls)
        plans = ((HeadPlan(Strategy(HeadType.STATIC), 1.0),) * heads,) * layers
        given = [
            {
                head: Packed(call.key[0, head].flip(0), call.value[0, head].flip(0), "whole")
                for head in range(heads)
            }
            for call in prefill.calls
        ]
        with apply(self.model, self.profile, _ANY_SHARE, min_tokens=1, compress_every=0) as handle:
            cache = handle.new_cache(prefill.tokens)
            prefill.fill_with(cache, plans, given)
            yield cache

    @contextmanager
    def _ours(self, budget: str, prefill: Prefill) -> Iterator[Caches]:
        """hkvprof as it is applied; where elements count fewer bytes than they have, its plans for
        those bytes hold the same tokens."""
        wide = prefill.calls[0].key.element_size()
        itemsize = self.itemsize or wide
        if budget in self.engines:
            given = self.engines[budget].allocation(prefill.tokens)
            with self._as_engine(given, prefill) as caches:
                yield caches
            return
        if itemsize == wide or prefill.tokens < MIN_TOKENS or Budget.parse(budget).share == 1:
            with apply(
                self.model, self.profile, budget, min_tokens=MIN_TOKENS, fetch=self.fetch
            ) as handle:

                def made() -> CompressedCache:
                    cache = handle.new_cache(prefill.tokens)
                    prefill.fill(cache)
                    return cache

                yield Caches(made, 0.0, 0, itemsize)
            return
        allocation = self.profile.allocation(budget, prefill.tokens, itemsize, fetch=self.fetch)
        fixed = self.profile.keep, Options().slot_bytes
        widened = Widened.to_fit(prefill, *fixed, itemsize)
        planned_heads = head_plans(self.profile.strategies, allocation)
        plans = [tuple(map(widened.plan, heads)) for heads in planned_heads]
        share = fmean(min(1.0, head.ratio) for heads in plans for head in heads)
        with apply(self.model, self.profile, budget=share, min_tokens=MIN_TOKENS) as handle:

            def planned() -> CompressedCache:
                cache = handle.new_cache(prefill.tokens)
                prefill.fill_with(cache, plans, [{}] * len(plans), share)
                return cache

            yield Caches(planned, 0.0, 0, itemsize)

    @contextmanager
    def _as_engine(self, given: Allocation, prefill: Prefill) -> Iterator[Caches]:
        """hkvprof under an engine's plan, replies whole as they are there."""
        plans = head_plans(self.profile.strategies, given)
        with apply(
            self.model, self.profile, _ANY_SHARE, min_tokens=MIN_TOKENS, compress_every=0
        ) as handle:

            def made() -> CompressedCache:
                cache = handle.new_cache(prefill.tokens)
                prefill.fill_with(cache, plans, [{}] * len(plans), _ANY_SHARE)
                return cache

            yield Caches(made, 0.0, 0, prefill.calls[0].key.element_size())

    def _prompt(self, entry: MethodAtBudget, prefill: Prefill) -> PromptView:
        dense = prefill.dense_bytes(self.itemsize)
        share = Budget.parse(entry.budget).resolve(prefill.tokens, dense)
        memo = self._memos.setdefault(id(prefill), {})
        return PromptView(
            self.model, prefill, share, self.profile, self.seed, memo, self.itemsize,
            self.calibration,
        )  # fmt: skip
