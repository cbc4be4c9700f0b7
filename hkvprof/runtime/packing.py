"""Which tokens of one (batch row, KV head) stay on the device, and in which order.

`pack` decides over tokens that are all still there, in order; `repack_static` and `repack_dynamic`
decide again after more tokens came (docs/method.md, "Long generation").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.profile.costs import (
    TOO_SHORT,
    DynamicLayout,
    dynamic_layout,
    least_layout,
    static_tokens,
)
from hkvprof.runtime.options import Options
from hkvprof.runtime.storage import DynamicHead, HostChunks
from hkvprof.selection.index import HeadTables, KeyIndex, build_index
from hkvprof.selection.rotary import Positions
from hkvprof.selection.static import rank_tokens, select_tokens


@dataclass(frozen=True)
class Rule:
    """How one head is to be packed: `ratio` is its share of dense bytes at this length, and
    `positions` tells those of so many tokens from a number on."""

    strategy: Strategy
    ratio: float
    keep: KeepRule
    options: Options
    tables: HeadTables | None
    scaling: float
    positions: Callable[[int, int], Positions] | None = None

    def items_positions(self, layout: DynamicLayout) -> Positions | None:
        """Of a dynamic head's items, where its index goes by them."""
        if self.tables is None or self.tables.bias is None or self.positions is None:
            return None
        return self.positions(layout.sinks, layout.items)

    def layout(self, tokens: int, key: Tensor) -> DynamicLayout | None:
        """Layout of a dynamic head of `tokens` tokens."""
        return dynamic_layout(
            self.strategy, self.ratio, tokens, self.keep, key.shape[-1], key.element_size(),
            self.options.slot_bytes,
        )  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A packed segment: what is resident, the rest on the host, and the strategy's name.

    `kept` are the numbers of the resident tokens among those given, None for dynamic heads; where
    they were chosen on a device they stay there, so that nobody waits for them.
    """

    key: Float[Tensor, "resident dim"]
    value: Float[Tensor, "resident dim"]
    name: str
    dynamic: DynamicHead | None = None
    kept: Int[Tensor, " resident"] | None = None


Attention = Callable[[], Float[Tensor, "1 tokens"]]
"""Gives the attention that the last rows pay to a head's tokens (selection.static)."""


def pack(
    rule: Rule,
    query: Float[Tensor, "group dim"],
    attention: Attention,
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    text: Bool[Tensor, " tokens"] | None,
) -> Packed:
    """Pack a head whose tokens are all there; `query` is that of the last row."""
    tokens = len(key)
    if rule.ratio * tokens >= tokens:
        return whole(key, value)
    if rule.strategy.head_type is HeadType.DYNAMIC:
        layout = rule.layout(tokens, key)
        if layout is not None:
            region = slice(layout.sinks, layout.sinks + layout.items * layout.chunk)
            items_key = key[region].view(layout.items, layout.chunk, -1)
            items_value = value[region].view(layout.items, layout.chunk, -1)
            places = rule.items_positions(layout)
            index = build_index(rule.strategy, items_key, rule.tables, places)
            host = HostChunks.store(items_key, items_value, rule.options.host_dtype)
            ends = _sinks_and_recent(layout, tokens, key.device)
            items = None if host.loses else (items_key, items_value)
            return _pack_dynamic(rule, layout, index, host, query, key[ends], value[ends], items)
        short = replace(rule.strategy, head_type=HeadType.STATIC, pool=1)
        packed = repack_static(replace(rule, strategy=short), attention, key, value, tokens, text)
        return replace(packed, name=TOO_SHORT)
    return repack_static(rule, attention, key, value, tokens, text)


def whole(key: Float[Tensor, "tokens dim"], value: Float[Tensor, "tokens dim"]) -> Packed:
    """A head that keeps every token."""
    return Packed(key, value, "whole", kept=torch.arange(len(key)))


def repack_static(
    rule: Rule,
    attention: Attention,
    key: Float[Tensor, "stored dim"],
    value: Float[Tensor, "stored dim"],
    tokens: int,
    text: Bool[Tensor, " stored"] | None,
) -> Packed:
    """Prune the stored tokens, in order of position, to what the head may keep of `tokens`."""
    count = static_tokens(rule.ratio, tokens, rule.keep)
    if count >= len(key):
        return Packed(key, value, rule.strategy.name, kept=torch.arange(len(key)))
    ranking = rank_tokens(attention(), rule.strategy.pool, rule.keep)[0]
    chosen = select_tokens(ranking, count, rule.strategy, rule.keep, text)
    return Packed(key[chosen], value[chosen], rule.strategy.name, kept=chosen)


def repack_dynamic(
    rule: Rule,
    query: Float[Tensor, "group dim"],
    key: Float[Tensor, "stored dim"],
    value: Float[Tensor, "stored dim"],
    tokens: int,
    head: DynamicHead,
) -> Packed:
    """Move full chunks of a dynamic head's newer tokens to the host and give it its new share.

    `key` and `value` are the segment: sinks, recent tokens, hot slots, tokens since.
    """
    old = head.layout
    layout = rule.layout(tokens, key)
    if layout is None:  # a budget in tokens or bytes that the growing index has used up
        layout = least_layout(rule.strategy, tokens, rule.keep)
    begin, end = old.sinks, head.hot_start + old.hot * old.chunk
    newer_key = torch.cat([key[begin : head.hot_start], key[end:]])
    newer_value = torch.cat([value[begin : head.hot_start], value[end:]])
    added = layout.items - old.items
    moved = added * layout.chunk
    index, host = head.index, head.host
    if added:
        items_key = newer_key[:moved].view(added, layout.chunk, -1)
        items_value = newer_value[:moved].view(added, layout.chunk, -1)
        index = index.append(items_key, rule.items_positions(layout))
        host = host.append(items_key, items_value)
    ends_key = torch.cat([key[: layout.sinks], newer_key[moved:]])
    ends_value = torch.cat([value[: layout.sinks], newer_value[moved:]])
    return _pack_dynamic(rule, layout, index, host, query, ends_key, ends_value)


def _pack_dynamic(
    rule: Rule,
    layout: DynamicLayout,
    index: KeyIndex,
    host: HostChunks,
    query: Float[Tensor, "group dim"],
    ends_key: Float[Tensor, "ends dim"],
    ends_value: Float[Tensor, "ends dim"],
    items: tuple[Tensor, Tensor] | None = None,
) -> Packed:
    """The hot set starts from the last row's query; `items` spare reading them from the host."""
    score = torch.nan_to_num(index.score(query, rule.scaling), nan=-1.0)
    best = score.topk(layout.hot)
    slots = best.indices.to(torch.int32)
    hot_score = best.values.float() if rule.options.smoothing else None
    if items is None:
        hot_key, hot_value = host.fetch(best.indices, ends_key.device).unbind(dim=1)
    else:
        hot_key, hot_value = (part.index_select(0, best.indices) for part in items)
    return Packed(
        torch.cat([ends_key, hot_key.flatten(0, 1)]),
        torch.cat([ends_value, hot_value.flatten(0, 1)]),
        rule.strategy.name,
        DynamicHead(layout, host, index, rule.strategy.rerank, slots, hot_score),
    )


def _sinks_and_recent(
    layout: DynamicLayout, tokens: int, device: torch.device
) -> Int[Tensor, " ends"]:
    return torch.cat(
        [
            torch.arange(layout.sinks, device=device),
            torch.arange(tokens - layout.recent, tokens, device=device),
        ]
    )
