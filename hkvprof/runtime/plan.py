"""From a profile and a budget to what every layer does with each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from hkvprof.errors import BudgetError
from hkvprof.heads import CALIBRATED, HeadType, Strategy
from hkvprof.profile.budgets import ANY, Allocation, Budget, Fetch
from hkvprof.profile.costs import QUIET, Worth, dynamic_layout, held_bytes
from hkvprof.profile.record import Profile
from hkvprof.runtime.copies import NeverCopied
from hkvprof.runtime.kernels import for_device
from hkvprof.runtime.options import Options
from hkvprof.selection.index import HeadTables
from hkvprof.selection.static import QueryCentres


@dataclass(frozen=True)
class HeadPlan:
    """What one KV head does: its strategy, the share of its dense bytes, all included, and how many
    items may become hot in a step."""

    strategy: Strategy
    ratio: float
    fresh: int = ANY


@dataclass(frozen=True, eq=False)
class RowPlan:
    """What the KV heads of every layer do with one batch row, or the reason why it stays dense.

    Planned for `tokens` tokens, of whose dense bytes the row may keep `share`.
    """

    tokens: int
    share: float
    layers: tuple[tuple[HeadPlan, ...], ...] = ()
    dense_reason: str = ""


@dataclass(frozen=True)
class Schedule:
    """What comes of a plan at some length: ratios times `factor`, and `room` for so many tokens
    until the row joins the budget again. `held` tokens per head are held, where the budget is
    `worth` so many."""

    factor: float
    room: int
    worth: Worth
    held: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether what is held is within the budget and its allowance."""
        return self.held <= self.worth.limit(0)

    def spare(self, tail: int) -> int:
        """Tokens for which the storage may have room after `tail` tokens."""
        left = max(0, self.room - tail)
        return left if self.room >= QUIET else min(left, self.worth.spare(self.held, tail))


def head_plans(menu: Sequence[Strategy], allocation: Allocation) -> list[tuple[HeadPlan, ...]]:
    """Every layer's heads as allocated."""
    return [
        tuple(
            HeadPlan(menu[choice], float(ratio), int(fresh))
            for choice, ratio, fresh in zip(*layer, strict=True)
        )
        for layer in zip(allocation.strategy, allocation.ratio, allocation.limits, strict=True)
    ]


class Planner(NeverCopied):
    """Answers, for every row, what each layer does; and holds the constants of heads on the device.

    `budget` is a share or tokens, of every row by its own length, or bytes of all rows together:
    those that stay dense have theirs, and the others get one share of their dense bytes. Rows
    shorter than `options.min_tokens` stay dense. `origin` is where the profile came from, `fetch`
    what a decoding step of a row may read from host memory; it does not grow with the row.
    """

    def __init__(
        self,
        profile: Profile,
        budget: Budget,
        options: Options,
        origin: str = "",
        fetch: Fetch | None = None,
    ) -> None:
        self.profile = profile
        self.origin = origin
        self.budget = budget
        self.options = options
        self.fetch = Fetch() if fetch is None else fetch
        self._tables: dict[tuple[torch.device, int, int, int], HeadTables] = {}
        self._centres: dict[tuple[torch.device, int, int], QueryCentres] = {}
        self._plan = lru_cache(maxsize=256)(self._planned)
        self._scheduled = lru_cache(maxsize=64)(self._schedule)

    @property
    def keeps_everything(self) -> bool:
        """Whether the budget is the whole cache."""
        return self.budget.share is not None and self.budget.share >= 1

    @property
    def needs_text(self) -> bool:
        """Whether a strategy wants to know which prompt tokens are text."""
        return any(strategy.text_prior for strategy in self.profile.strategies)

    def rows(self, lengths: Sequence[int], itemsize: int, strict: bool) -> tuple[RowPlan, ...]:
        """One plan per row of a batch, whose rows are `lengths` tokens long.

        Where the budget cannot hold a row's sinks, recent tokens and floor, `strict` raises
        BudgetError, which names the row; else the row stays dense with that reason.
        """
        plans = []
        for row, tokens in enumerate(lengths):
            try:
                plans.append(self._row(row, lengths, itemsize))
            except BudgetError as error:
                what = f"row {row}, a prompt of {tokens} tokens: {error}"
                reason = str(error) if len(lengths) == 1 else what
                if strict:
                    raise BudgetError(reason) from None
                plans.append(RowPlan(tokens, 1.0, dense_reason=reason))
        return tuple(plans)

    def schedule(
        self, plan: RowPlan, row: int, lengths: Sequence[int], itemsize: int, first: bool
    ) -> Schedule:
        """What comes of the plan of row number `row` when the rows are `lengths` tokens long.

        At the `first` compression it is as planned; later ones leave room for tokens to come.
        """
        tokens, every = lengths[row], self.options.compress_every or QUIET
        worth = self._worth(row, lengths, itemsize)
        if not plan.dense_reason:
            return self._scheduled(plan, tokens, worth, itemsize, first)
        room = every
        if self.keeps_everything:
            room = QUIET
        elif tokens < self.options.min_tokens:
            room = min(every, self.options.min_tokens - tokens)
        elif worth.now >= tokens:
            room = worth.room(tokens, every)
        return Schedule(1.0, room, Worth(tokens, 1.0), tokens)

    def _row(self, row: int, lengths: Sequence[int], itemsize: int) -> RowPlan:
        tokens = lengths[row]
        if self.keeps_everything:
            return RowPlan(tokens, 1.0, dense_reason="the budget is 1.0")
        if tokens < self.options.min_tokens:
            least = self.options.min_tokens
            reason = f"prompt of {tokens} tokens is shorter than min_tokens={least}"
            return RowPlan(tokens, 1.0, dense_reason=reason)
        share = min(1.0, self._share(row, lengths, itemsize))
        if share <= 0:
            raise BudgetError(
                f"the rows that stay dense (shorter than min_tokens={self.options.min_tokens}) "
                f"alone take the whole budget of {self.budget}: raise it, or run them by themselves"
            )
        return self._plan(tokens, share, itemsize)

    def _planned(self, tokens: int, share: float, itemsize: int) -> RowPlan:
        allocation = self.profile.allocation(
            Budget(share=share),
            tokens,
            itemsize,
            fetch=self.fetch,
            int8_host=self.options.int8_host,
        )
        if bool((allocation.ratio >= 1).all()):
            return RowPlan(tokens, share, dense_reason="the budget holds the whole prompt")
        return RowPlan(tokens, share, tuple(head_plans(self.profile.strategies, allocation)))

    def _share(self, row: int, lengths: Sequence[int], itemsize: int, more: int = 0) -> float:
        """Of a row's dense bytes after `more` tokens in every row; above 1 where all fits."""
        if self.budget.share is not None:
            return self.budget.share
        if self.budget.tokens is not None:
            return self.budget.tokens / (lengths[row] + more)
        assert self.budget.bytes is not None
        unit = self.profile.grid.token_bytes(itemsize)
        short = [n + more for n in lengths if n < self.options.min_tokens]
        others = [n + more for n in lengths if n >= self.options.min_tokens]
        return (self.budget.bytes - unit * sum(short)) / max(unit * sum(others), 1)

    def _worth(self, row: int, lengths: Sequence[int], itemsize: int) -> Worth:
        """In tokens per head. Bytes of rows of unequal length move from row to row as all grow: by
        the least of what they do at once and over a while."""
        tokens = lengths[row]
        if self.budget.share is not None:
            return Worth(self.budget.share * tokens, self.budget.share)
        if self.budget.tokens is not None:
            return Worth(float(self.budget.tokens))
        now, soon, later = (
            max(0.0, self._share(row, lengths, itemsize, more)) * (tokens + more)
            for more in (0, 1, self.options.compress_every or 1)
        )
        slope = (later - now) / (self.options.compress_every or 1)
        return Worth(now, min(soon - now, slope))

    def _schedule(
        self, plan: RowPlan, tokens: int, worth: Worth, itemsize: int, first: bool
    ) -> Schedule:
        every = self.options.compress_every
        factor = 1.0 if first else min(1.0, worth.now / tokens) / plan.share
        if not every:
            return Schedule(factor, QUIET, worth)
        held = self._held(plan, tokens, factor, itemsize)
        if not first:
            target = worth.target(every)
            for _ in range(4):  # heads that are at their least give nothing: the others do
                if held <= target:
                    break
                factor = max(0.0, factor * (1 - (held - target) / held))
                held = self._held(plan, tokens, factor, itemsize)
        return Schedule(factor, worth.room(held, every), worth, held)

    def _held(self, plan: RowPlan, tokens: int, factor: float, itemsize: int) -> float:
        """Tokens per head that the row holds once it is compressed, all bytes counted."""
        dim, keep, slot = self.profile.grid.head_dim, self.profile.keep, self.options.slot_bytes
        total, count = self.profile.position_bytes(tokens), 0
        for head in (head for layer in plan.layers for head in layer):
            strategy, fixed = head.strategy, (keep, dim, itemsize, slot)
            dynamic = strategy.head_type is HeadType.DYNAMIC and head.ratio < 1
            if dynamic and dynamic_layout(strategy, head.ratio, plan.tokens, *fixed) is None:
                strategy = replace(strategy, head_type=HeadType.STATIC)  # too short (packing)
            total += held_bytes(strategy, head.ratio * factor, tokens, *fixed)
            count += 1
        return total / (count * 2 * dim * itemsize)

    def tables(
        self, layer: int, head: int, strategy: Strategy, device: torch.device
    ) -> HeadTables | None:
        """The projected-index constants of one head on `device`; None for other strategies."""
        index = self.profile.index
        if strategy.head_type is HeadType.STATIC or strategy.index != "projected" or index is None:
            return None
        key = (device, layer, head, strategy.bits)
        if key not in self._tables:
            encoder = for_device(device, torch.float32).encode
            self._tables[key] = HeadTables.load(index, layer, head, strategy.bits, device, encoder)
        return self._tables[key]

    def centres(
        self, layer: int, head: int, strategy: Strategy, device: torch.device
    ) -> QueryCentres | None:
        """The queries that a calibrated score asks of one head; None for other strategies."""
        queries = self.profile.queries
        if strategy.score != CALIBRATED or queries is None:
            return None
        key, group = (device, layer, head), self.profile.grid.group
        if key not in self._centres:
            heads = slice(head * group, (head + 1) * group)
            self._centres[key] = QueryCentres.load(queries, layer, heads, device)
        return self._centres[key]

    @property
    def shared_bytes(self) -> int:
        """Device bytes of the constants of heads loaded so far, shared by all requests."""
        tensors = [tensor for table in self._tables.values() for tensor in table.tensors()]
        tensors += [tensor for own in self._centres.values() for tensor in own.tensors()]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@dataclass(frozen=True)
class BatchRow:
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
    ) -> BatchRow:
        """Row number `row` of rows that are `lengths` tokens long, as planned; `size` bytes per
        element."""
        return cls(plan, planner.schedule(plan, row, lengths, size, first=True), seen)

    def again(
        self, planner: Planner, row: int, lengths: Sequence[int], size: int, seen: int
    ) -> BatchRow:
        """It joins the budget; one that was whole is planned anew."""
        if self.is_whole:
            plan = planner.rows(lengths, size, strict=False)[row]
            return BatchRow.first(planner, plan, row, lengths, size, seen)
        schedule = planner.schedule(self.plan, row, lengths, size, first=False)
        return BatchRow(self.plan, schedule, seen)


def first_rows(
    planner: Planner, plans: Sequence[RowPlan], lengths: Sequence[int], size: int, seen: int
) -> list[BatchRow]:
    """The rows of a batch as planned (`BatchRow.first`)."""
    return [
        BatchRow.first(planner, plan, row, lengths, size, seen) for row, plan in enumerate(plans)
    ]


def reasons(rows: Sequence[RowPlan]) -> str:
    """Why rows stay dense, in one text; empty where none does."""
    dense = {row: plan.dense_reason for row, plan in enumerate(rows) if plan.dense_reason}
    if len(dense) == len(rows) and len(set(dense.values())) == 1:
        return dense[0]
    texts = [
        reason if reason.startswith(f"row {row}") else f"row {row}: {reason}"
        for row, reason in dense.items()
    ]
    more = [f"and {len(texts) - 4} more rows"] if len(texts) > 4 else []
    return "; ".join(texts[:4] + more)
