"""What a comparison compares: methods, budgets and regimes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hkvprof.errors import UsageError
from hkvprof.evaluate.baselines.registry import baselines, find
from hkvprof.evaluate.records import FULL, OURS, REGIMES, Answer
from hkvprof.evaluate.replay import STEPS
from hkvprof.evaluate.taskset import TaskSet
from hkvprof.profile.budgets import Budget


@dataclass(frozen=True)
class Entry:
    """One row of the comparison: hkvprof or a baseline, at one budget (as the user wrote it)."""

    method: str
    budget: str

    @property
    def is_whole(self) -> bool:
        """Whether the budget is the whole cache."""
        return Budget.parse(self.budget).share == 1


@dataclass(frozen=True)
class Plan:
    """hkvprof and `baselines` (names) at every budget, in these regimes.

    `steps` tokens of the full cache's continuation are forced per question; `seed` is for methods
    that draw. Raises UsageError, BudgetError.
    """

    budgets: tuple[str, ...]
    baselines: tuple[str, ...] = ()
    regimes: tuple[str, ...] = tuple(REGIMES)
    steps: int = STEPS
    seed: int = 0

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
    def entries(self) -> tuple[Entry, ...]:
        """Rows beside the full cache; baselines have nothing to show at the whole cache."""
        ours = [Entry(OURS, budget) for budget in self.budgets]
        theirs = [Entry(name, budget) for name in self.baselines for budget in self.budgets]
        return (*ours, *(entry for entry in theirs if not entry.is_whole))

    @property
    def public(self) -> set[str]:
        """Names of baselines that are peers' methods, not ablations."""
        return {name for name, one in baselines().items() if one.public}

    def conditions(self) -> dict[str, Any]:
        """What answers depend on, whatever rows are asked for."""
        return {"regimes": list(self.regimes), "steps": self.steps, "seed": self.seed}

    def fitting(self, tasks: TaskSet, given: bool) -> Plan:
        """Without `later` where no sample has a follow-up, unless the regimes were given."""
        if given or any(sample.followups for sample in tasks.samples):
            return self
        return replace(self, regimes=tuple(r for r in self.regimes if r != "later"))

    def select(self, answers: Iterable[Answer], tasks: TaskSet) -> list[Answer]:
        """Answers to these samples by the full cache and this plan's rows."""
        wanted = {(FULL, ""), *((entry.method, entry.budget) for entry in self.entries)}
        samples = {sample.id for sample in tasks.samples}
        return [a for a in answers if (a.method, a.budget) in wanted and a.sample in samples]
