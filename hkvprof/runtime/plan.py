"""From a profile and a budget to what every layer does with a prompt of a given length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from hkvprof.artifact import Profile
from hkvprof.errors import BudgetError
from hkvprof.heads import HeadType, Strategy
from hkvprof.policy.budget import Allocation, Budget
from hkvprof.policy.index import HeadTables
from hkvprof.runtime.kernels import for_device
from hkvprof.runtime.options import Options


@dataclass(frozen=True)
class HeadPlan:
    """What one KV head does: its strategy and the share of its dense bytes, all included."""

    strategy: Strategy
    ratio: float


@dataclass(frozen=True)
class LayerPlan:
    """Plans of a layer's KV heads, or the reason why the layer stays dense."""

    heads: tuple[HeadPlan, ...] = ()
    dense_reason: str = ""


def head_plans(menu: Sequence[Strategy], allocation: Allocation) -> list[tuple[HeadPlan, ...]]:
    """Every layer's heads as allocated."""
    return [
        tuple(
            HeadPlan(menu[choice], float(ratio))
            for choice, ratio in zip(choices, ratios, strict=True)
        )
        for choices, ratios in zip(allocation.strategy, allocation.ratio, strict=True)
    ]


class Planner:
    """Answers, for every prompt, what each layer does; and holds the index tables on the device.

    `budget` is a share, tokens or bytes; prompts shorter than `options.min_tokens` stay dense.
    """

    def __init__(self, profile: Profile, budget: Budget, options: Options) -> None:
        self.profile = profile
        self.budget = budget
        self.options = options
        self._tables: dict[tuple[torch.device, int, int, int], HeadTables] = {}
        self._allocate = lru_cache(maxsize=256)(self._allocation)

    @property
    def keeps_everything(self) -> bool:
        """Whether the budget is the whole cache."""
        return self.budget.share is not None and self.budget.share >= 1

    @property
    def needs_text(self) -> bool:
        """Whether a strategy wants to know which prompt tokens are text."""
        return any(strategy.text_prior for strategy in self.profile.strategies)

    def growth(self, planned: int, tokens: int) -> float:
        """What a ratio planned for `planned` tokens becomes at `tokens` tokens.

        A share is a share of any length; tokens and bytes stay what they are.
        """
        return 1.0 if self.budget.share is not None else planned / tokens

    def layers(self, tokens: int, rows: int, itemsize: int, strict: bool) -> tuple[LayerPlan, ...]:
        """One plan per covered layer for prompts of up to `tokens` tokens in `rows` rows.

        Where the budget cannot hold sinks, recent tokens and the floor, `strict` raises
        BudgetError; else the layers stay dense with that reason.
        """
        count = self.profile.grid.layers
        if self.keeps_everything:
            return (LayerPlan(dense_reason="the budget is 1.0"),) * count
        if tokens < self.options.min_tokens:
            reason = (
                f"prompt of {tokens} tokens is shorter than min_tokens={self.options.min_tokens}"
            )
            return (LayerPlan(dense_reason=reason),) * count
        try:
            allocation = self._allocate(tokens, rows, itemsize)
        except BudgetError as error:
            if strict:
                raise
            return (LayerPlan(dense_reason=str(error)),) * count
        if bool((allocation.ratio >= 1).all()):
            return (LayerPlan(dense_reason="the budget holds the whole prompt"),) * count
        return tuple(LayerPlan(plans) for plans in head_plans(self.profile.strategies, allocation))

    def _allocation(self, tokens: int, rows: int, itemsize: int) -> Allocation:
        return self.profile.allocation(self.budget, tokens, itemsize, rows)

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

    @property
    def shared_bytes(self) -> int:
        """Device bytes of the index tables loaded so far, shared by all requests."""
        return sum(
            tensor.untyped_storage().nbytes()
            for table in self._tables.values()
            for tensor in table.tensors()
        )
