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

from hkvprof.heads import EXACT_BITS, HeadType, KeepRule, Strategy
from hkvprof.profile.budgets import ANY
from hkvprof.profile.costs import (
    TOO_SHORT,
    DynamicLayout,
    StaticLayout,
    dynamic_layout,
    least_layout,
    static_layout,
)
from hkvprof.runtime.options import Options
from hkvprof.runtime.storage import DynamicHead, HostChunks
from hkvprof.selection.index import HeadTables, KeyIndex, build_index
from hkvprof.selection.residents import Residents
from hkvprof.selection.rotary import Positions
from hkvprof.selection.static import rank_tokens, select_tokens


@dataclass(frozen=True)
class Rule:
    """How one head is to be packed: `ratio` is its share of dense bytes at this length, in a step
    at most `fresh` items become hot, and `positions` tells those of so many tokens from a number
    on."""

    strategy: Strategy
    ratio: float
    keep: KeepRule
    options: Options
    tables: HeadTables | None
    scaling: float
    fresh: int = ANY
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

    def kept(self, tokens: int, key: Tensor) -> StaticLayout:
        """What a static head keeps of `tokens` tokens."""
        sizes = (key.shape[-1], key.element_size())
        return static_layout(self.strategy, self.ratio, tokens, self.keep, *sizes)


@dataclass(frozen=True)
class Packed:
    """A packed segment: what is resident, the rest on the host, and the strategy's name.

    `kept` are the numbers of the resident tokens among those given, those in fewer bits (`held`)
    first, None for dynamic heads; where they were chosen on a device they stay there, so that
    nobody waits for them.
    """

    key: Float[Tensor, "exact dim"]
    value: Float[Tensor, "exact dim"]
    name: str
    dynamic: DynamicHead | None = None
    kept: Int[Tensor, " resident"] | None = None
    held: Residents | None = None


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
            ends = _ends(torch.arange(tokens, device=key.device), layout.sinks, layout.recent)
            items, bits = (items_key, items_value), rule.strategy.resident_bits
            held = host.coder
            if held is None and bits != EXACT_BITS:
                held = Residents.around(key[region], value[region], bits)
            stores = Stores(index, host, None if bits == EXACT_BITS else held)
            given = None if host.loses else items
            return _pack_dynamic(rule, layout, stores, query, (key[ends], value[ends]), given)
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
    held: Residents | None = None,
) -> Packed:
    """Prune the stored tokens, in order of position, to what the head may keep of `tokens`.

    Those after the sinks that are `held` in fewer bits already are not quantised again.
    """
    layout, name = rule.kept(tokens, key), rule.strategy.name
    if layout.tokens >= len(key):
        chosen = torch.arange(len(key), device=key.device if layout.quantised else None)
    else:
        ranking = rank_tokens(attention(), rule.strategy.pool, rule.keep)[0]
        chosen = select_tokens(ranking, layout.tokens, rule.strategy, rule.keep, text)
    if len(chosen) > layout.exact:
        return _pack_quantised(rule, key, value, chosen, held)
    if len(chosen) < len(key):
        key, value = key[chosen], value[chosen]
    return Packed(key, value, name, kept=chosen)


def _pack_quantised(
    rule: Rule,
    key: Float[Tensor, "stored dim"],
    value: Float[Tensor, "stored dim"],
    chosen: Int[Tensor, " kept"],
    held: Residents | None,
) -> Packed:
    """The chosen tokens, all but sinks and recent ones in fewer bits."""
    sinks, recent = rule.keep.sinks, rule.keep.recent
    few, ends = chosen[sinks : len(chosen) - recent], _ends(chosen, sinks, recent)
    if held is None:
        middle, bits = slice(sinks, len(key) - recent), rule.strategy.resident_bits
        held = Residents.around(key[middle], value[middle], bits).append(key[few], value[few])
    else:
        new = slice(sinks + len(held.rows), len(key) - recent)
        held = held.append(key[new], value[new]).take(few - sinks)
    kept = torch.cat([few, ends])
    return Packed(key[ends], value[ends], rule.strategy.name, kept=kept, held=held)


def in_order(held: int, sinks: int, stored: int) -> Int[Tensor, " stored"]:
    """Numbers of a static segment's tokens in order of position: `held` of the `stored` are in
    fewer bits and come first, where those in its storage begin with its sinks."""
    first = torch.arange(held, held + min(sinks, stored - held))
    return torch.cat([first, torch.arange(held), torch.arange(held + len(first), stored)])


def _ends(tokens: Tensor, first: int, last: int) -> Tensor:
    return torch.cat([tokens[:first], tokens[len(tokens) - last :]])


def repack_dynamic(
    rule: Rule,
    query: Float[Tensor, "group dim"],
    key: Float[Tensor, "stored dim"],
    value: Float[Tensor, "stored dim"],
    tokens: int,
    head: DynamicHead,
    held: Residents | None = None,
) -> Packed:
    """Move full chunks of a dynamic head's newer tokens to the host and give it its new share.

    `key` and `value` are the segment: sinks, recent tokens, hot slots (unless these are `held` in
    fewer bits), tokens since. Nothing is read from the host: hot are those of the items that are on
    the device now.
    """
    old = head.layout
    layout = rule.layout(tokens, key)
    if layout is None:  # a budget in tokens or bytes that the growing index has used up
        layout = least_layout(rule.strategy, tokens, rule.keep)
    begin, end = old.sinks, head.hot_end
    newer_key = torch.cat([key[begin : head.hot_start], key[end:]])
    newer_value = torch.cat([value[begin : head.hot_start], value[end:]])
    added = layout.items - old.items
    moved = added * layout.chunk
    index, host, new = head.index, head.host, None
    if added:
        items_key = newer_key[:moved].view(added, layout.chunk, -1)
        items_value = newer_value[:moved].view(added, layout.chunk, -1)
        index = index.append(items_key, rule.items_positions(layout))
        host = host.append(items_key, items_value)
        new = (items_key, items_value)
    ends = tuple(
        torch.cat([part[: layout.sinks], newer[moved:]])
        for part, newer in ((key, newer_key), (value, newer_value))
    )
    hot = slice(head.hot_start, end)
    chunks = [part[hot].view(-1, old.chunk, part.shape[1]) for part in (key, value)]
    here = torch.cat([head.slots.long(), torch.arange(old.items, layout.items, device=key.device)])
    stores = Stores(index, host, held)
    layout = replace(layout, hot=min(layout.hot, len(here)))
    given = stores.present((chunks[0], chunks[1]), new)
    return _pack_dynamic(rule, layout, stores, query, (ends[0], ends[1]), given, here)


Pair = tuple[Tensor, Tensor]
"""Keys and values [items, chunk, dim]."""


@dataclass(frozen=True)
class Stores:
    """A dynamic head's index and host items; with `held` its hot slots are in fewer bits, by the
    format and mean that this has."""

    index: KeyIndex
    host: HostChunks
    held: Residents | None

    def present(self, hot: Pair, new: Pair | None) -> Pair | Tensor:
        """What is on the device, hot items and then those that are new on the host, as slots hold
        them: keys and values, or rows."""
        rows, coder = None, self.held or self.host.coder
        if new is not None and coder is not None:
            rows = coder.on(new[0].device).encode_items(*new)
        if self.held is not None:
            old = self.held.rows.unflatten(0, (-1, self.host.chunk))
            return old if rows is None else torch.cat([old, rows])
        if new is None:
            return hot
        if rows is not None and coder is not None:
            key, value = coder.decode_items(rows).unbind(dim=1)
            new = key, value
        return torch.cat([hot[0], new[0]]), torch.cat([hot[1], new[1]])

    def rows(self, items: Int[Tensor, " n"], given: Pair | Tensor | None) -> Residents:
        """These items as they are held; `given` are keys and values, or rows, to number and to
        spare reads."""
        assert self.held is not None
        coder = self.held.on(items.device)
        if isinstance(given, Tensor):
            rows = given.index_select(0, items)
        elif self.host.coder is not None:
            rows = self.host.stored(items, items.device)
        else:
            rows = coder.encode_items(*self.whole(items, given))
        return replace(coder, rows=rows.flatten(0, 1))

    def whole(self, items: Int[Tensor, " n"], given: Pair | None) -> Pair:
        """Their keys and values [n, chunk, dim] in the model's dtype."""
        if given is not None:
            return given[0].index_select(0, items), given[1].index_select(0, items)
        key, value = self.host.fetch(items, items.device).unbind(dim=1)
        return key, value


def _pack_dynamic(
    rule: Rule,
    layout: DynamicLayout,
    stores: Stores,
    query: Float[Tensor, "group dim"],
    ends: tuple[Float[Tensor, "ends dim"], Float[Tensor, "ends dim"]],
    given: Pair | Tensor | None = None,
    here: Int[Tensor, " n"] | None = None,
) -> Packed:
    """The hot set starts from the last row's query; items that are `given` are not read again: all,
    or those with the numbers `here`, among which then are the hot ones."""
    score = torch.nan_to_num(stores.index.score(query, rule.scaling), nan=-1.0)
    best = (score if here is None else score[here]).topk(layout.hot)
    slots = (best.indices if here is None else here[best.indices]).to(torch.int32)
    hot_score = best.values.float() if rule.options.smoothing else None
    head = DynamicHead(
        layout, stores.host, stores.index, rule.strategy.rerank, slots, hot_score, fresh=rule.fresh
    )
    name = rule.strategy.name
    if stores.held is not None:
        held = stores.rows(best.indices, given)
        return Packed(*ends, name, replace(head, bits=held.format.bits), held=held)
    assert not isinstance(given, Tensor)
    hot = stores.whole(best.indices, given)
    key, value = (torch.cat([end, one.flatten(0, 1)]) for end, one in zip(ends, hot, strict=True))
    return Packed(key, value, name, head)
