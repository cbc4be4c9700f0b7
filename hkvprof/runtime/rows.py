"""The batch rows of a compressed layer: each by its own length, plan and room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hkvprof.runtime.plan import Planner, RowPlan, Schedule


@dataclass(frozen=True)
class Row:
    """One batch row. `base` is the logical length, padding included, when it last joined the budget
    (or decided to stay dense); later tokens are its tail."""

    plan: RowPlan
    schedule: Schedule
    base: int

    @property
    def is_whole(self) -> bool:
        """Whether it stays dense beside rows that are compressed."""
        return bool(self.plan.dense_reason)

    @property
    def until(self) -> int:
        """Logical length up to which tokens may come before it must join the budget again."""
        return self.base + self.schedule.room

    def is_due(self, seen: int, new: int) -> bool:
        """Whether it must join now, before `new` tokens follow the `seen` ones.

        A pass that is longer than the room anyway does not make it join early.
        """
        more = new if new <= self.schedule.room else 1
        return seen + more > self.until

    @classmethod
    def first(
        cls, planner: Planner, plan: RowPlan, row: int, lengths: Sequence[int], size: int, seen: int
    ) -> Row:
        """Row number `row` of rows that are `lengths` tokens long, as planned; `size` bytes per
        element."""
        return cls(plan, planner.schedule(plan, row, lengths, size, first=True), seen)

    def again(
        self, planner: Planner, row: int, lengths: Sequence[int], size: int, seen: int
    ) -> Row:
        """It joins the budget; one that was whole is planned anew."""
        if self.is_whole:
            plan = planner.rows(lengths, size, strict=False)[row]
            return Row.first(planner, plan, row, lengths, size, seen)
        schedule = planner.schedule(self.plan, row, lengths, size, first=False)
        return Row(self.plan, schedule, seen)


def reasons(rows: Sequence[RowPlan]) -> str:
    """Why rows stay dense, in one text; empty where none does."""
    found = {row: plan.dense_reason for row, plan in enumerate(rows) if plan.dense_reason}
    if len(found) == len(rows) and len(set(found.values())) == 1:
        return found[0]
    texts = [
        reason if reason.startswith(f"row {row}") else f"row {row}: {reason}"
        for row, reason in found.items()
    ]
    more = [f"and {len(texts) - 4} more rows"] if len(texts) > 4 else []
    return "; ".join(texts[:4] + more)
