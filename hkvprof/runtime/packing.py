"""Which tokens of one batch row every head keeps, and in which order they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from hkvprof.heads import HeadType
from hkvprof.policy.costs import DynamicLayout, dynamic_layout, static_tokens
from hkvprof.policy.static import rank_tokens, select_tokens, window_attention
from hkvprof.runtime.host import DynamicHead
from hkvprof.runtime.plan import HeadPlan
from hkvprof.runtime.prompt import Conversation


class RowPacker:
    """Packs the heads of one batch row; window scores are computed once for all heads."""

    def __init__(
        self, shared: Conversation, layer: int, row: int, start: int, scaling: float
    ) -> None:
        self.shared, self.layer, self.row, self.start = shared, layer, row, start
        self.scaling = scaling
        text = shared.prompt.text
        self.text = None if text is None else text[row, start:]
        self._attention: Tensor | None = None

    def pack(
        self, query: Tensor, key: Tensor, value: Tensor, head: int, plan: HeadPlan
    ) -> tuple[tuple[Tensor, Tensor], DynamicHead | None, str]:
        """Resident K and V of one head, its dynamic state if any, and its strategy's name."""
        keep = self.shared.planner.profile.keep
        own_key, own_value = key[self.row, head, self.start :], value[self.row, head, self.start :]
        tokens = len(own_key)
        if plan.ratio * tokens >= tokens:
            return (own_key, own_value), None, "whole"
        strategy = plan.strategy
        if strategy.head_type is HeadType.DYNAMIC:
            layout = dynamic_layout(
                strategy, plan.ratio, tokens, keep, key.shape[-1], key.element_size()
            )
            if layout is not None:
                return self._pack_dynamic(query, own_key, own_value, head, plan, layout)
        scores = self._window(query, key)[head : head + 1]
        ranking = rank_tokens(scores, strategy.pool, keep)[0]
        count = static_tokens(plan.ratio, tokens, keep)
        chosen = select_tokens(ranking, count, strategy, keep, self.text)
        short = strategy.head_type is HeadType.DYNAMIC
        name = "static (row too short for its index)" if short else strategy.name
        return (own_key[chosen], own_value[chosen]), None, name

    def _pack_dynamic(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head: int,
        plan: HeadPlan,
        layout: DynamicLayout,
    ) -> tuple[tuple[Tensor, Tensor], DynamicHead, str]:
        group = self.shared.grid.group
        last = query[self.row, head * group : (head + 1) * group, -1]
        tables = self.shared.planner.tables(self.layer, head, plan.strategy, key.device)
        state = DynamicHead.build(key, value, last, self.scaling, plan.strategy, layout, tables)
        hot = (
            torch.arange(layout.chunk, device=key.device)
            + layout.sinks
            + state.slots.long()[:, None] * layout.chunk
        ).reshape(-1)
        order = torch.cat(
            [
                torch.arange(layout.sinks, device=key.device),
                torch.arange(len(key) - layout.recent, len(key), device=key.device),
                hot,
            ]
        )
        return (key[order], value[order]), state, plan.strategy.name

    def _window(self, query: Tensor, key: Tensor) -> Tensor:
        if self._attention is None:
            keys = key[self.row, :, self.start :]
            rows = min(self.shared.planner.profile.keep.window, keys.shape[1], query.shape[2])
            self._attention = window_attention(query[self.row, :, -rows:], keys, self.scaling)
        return self._attention
