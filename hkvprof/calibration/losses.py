"""What one layer loses when its KV heads are compressed: loss curves of a sample.

Everything works on one KV head's group and a block of rows at a time, so that no tensor grows with
heads x rows x tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hkvprof.heads import CALIBRATED, EXACT_BITS, WINDOW, HeadType, KeepRule, Strategy
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.costs import DynamicLayout, dynamic_layout, static_layout
from hkvprof.selection.index import HeadTables, KeyIndex, Ranking, build_index
from hkvprof.selection.residents import quantised
from hkvprof.selection.rotary import Positions
from hkvprof.selection.static import (
    QueryCentres,
    rank_tokens,
    select_tokens,
    window_attention,
)

BLOCK = 2**19
"""Attention weights of a block of decoding rows: 2 MiB in float32, and about ten copies of it."""
LEAST_TOTAL = 1e-20
"""Below this sum of weights relative to the densest token's, they are formed anew."""


@dataclass(frozen=True)
class DecodeRows:
    """One layer's view of the decoding rows to be judged (batch of one, R rows, T new tokens).

    `query` [query_heads, R, dim]; `key`/`value` [kv_heads, tokens, dim] of the prompt and
    `new_key`/`new_value` [kv_heads, T, dim] of the continuation; row r sees the new tokens up to
    `positions[r]`; `gradient` [R, query_heads, dim] of the reply's margin, over the margin itself;
    `projection` W_O [hidden, query_heads * dim]; `output_norm` [R] of the layer's attention output;
    `exact` [R]; `rotary`, the prompt's positions, where an index or a score goes by them.
    """

    query: Float[Tensor, "query_heads rows dim"]
    key: Float[Tensor, "kv_heads tokens dim"]
    value: Float[Tensor, "kv_heads tokens dim"]
    new_key: Float[Tensor, "kv_heads new dim"]
    new_value: Float[Tensor, "kv_heads new dim"]
    positions: Int[Tensor, " rows"]
    gradient: Float[Tensor, "rows query_heads dim"]
    projection: Float[Tensor, "hidden query_dim"]
    output_norm: Float[Tensor, " rows"]
    exact: Bool[Tensor, " rows"]
    scaling: float
    rotary: Positions | None = None

    def blocks(self) -> Iterator[DecodeRows]:
        """The same in parts of as many rows as BLOCK weights of a group allow, at least one."""
        count, tokens = self.query.shape[1], self.key.shape[1]
        step = max(1, BLOCK * len(self.key) // (len(self.query) * tokens))
        for first in range(0, count, step):
            part = slice(first, first + step)
            yield replace(
                self,
                query=self.query[:, part],
                positions=self.positions[part],
                gradient=self.gradient[part],
                output_norm=self.output_norm[part],
                exact=self.exact[part],
            )


@dataclass(frozen=True)
class LayerLosses:
    """What each strategy and ratio costs, per KV head: [strategies, kv_heads, ratios].

    `output` is the mean over rows of || (o - o') W_O || / || y ||, `square` the mean of its square,
    `reply` the mean of (gradient . (o - o'))^2: the squared relative change of the reply's margin.
    """

    output: Float[Tensor, "strategies kv_heads ratios"]
    square: Float[Tensor, "strategies kv_heads ratios"]
    reply: Float[Tensor, "strategies kv_heads ratios"]


def layer_losses(
    rows: DecodeRows,
    window_query: Float[Tensor, "query_heads window dim"],
    strategies: tuple[Strategy, ...],
    ratios: tuple[float, ...],
    keep: KeepRule,
    tables: dict[tuple[int, int], HeadTables],
    text: Bool[Tensor, " tokens"],
    itemsize: int,
    centres: Sequence[QueryCentres] = (),
) -> LayerLosses:
    """Loss curves of all KV heads of a layer, decided by the runtime's own selection code.

    `tables[(head, bits)]` are the projected-index constants, `centres` those of every KV head for
    calibrated scores. INFEASIBLE where a dynamic strategy's fixed bytes exceed the ratio.
    """
    group, count = len(rows.query) // len(rows.key), rows.query.shape[1]
    parts = list(rows.blocks())
    per_head = []
    for head in range(len(rows.key)):
        heads = slice(head * group, (head + 1) * group)
        fixed = _Head.of(rows, head, heads, keep)
        own = rows.key[head : head + 1]
        seen = {WINDOW: window_attention(window_query[heads], own, rows.scaling)}
        if centres:
            assert rows.rotary is not None, "calibrated scores need the prompt's positions"
            place = rows.rotary.next, rows.scaling
            seen[CALIBRATED] = centres[head].attention(own, *place)
        ways: list[_Static | _Dynamic] = []
        for strategy in strategies:
            if strategy.head_type is HeadType.STATIC:
                sizes = (ratios, keep, fixed.key.shape[1], itemsize)
                ways.append(_Static.of(seen[strategy.score], strategy, *sizes, text))
            else:
                table = tables.get((head, strategy.bits))
                index = (table, rows.rotary)
                ways.append(_Dynamic.of(fixed.key, strategy, ratios, keep, *index, itemsize))
        total = torch.zeros(len(strategies), len(ratios), 3, device=rows.key.device)
        for part in parts:
            judge = _Judge(part, fixed)
            curves = torch.stack([way.losses(judge) for way in ways])
            total += curves * part.query.shape[1]
        fits = curves < float(INFEASIBLE)  # whatever the rows
        per_head.append(torch.where(fits, total / count, float(INFEASIBLE)))
    stacked = torch.stack(per_head, dim=1)
    return LayerLosses(stacked[..., 0], stacked[..., 1], stacked[..., 2])


@dataclass(frozen=True)
class _Head:
    """What all blocks of rows share: a KV head's keys and values, and its group's part of W_O."""

    heads: slice
    key: Float[Tensor, "tokens dim"]
    value: Float[Tensor, "tokens dim"]
    new_key: Float[Tensor, "new dim"]
    new_value: Float[Tensor, "new dim"]
    metric: Float[Tensor, "group_dim group_dim"]
    keep: KeepRule
    _stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def stored(self, bits: int) -> tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens dim"]]:
        """Keys and values as residents of so many bits, sinks and recent tokens exact."""
        if bits not in self._stored:
            ends = self.keep.sinks, len(self.key) - self.keep.recent
            self._stored[bits] = quantised(self.key, self.value, bits, *ends)
        return self._stored[bits]

    @classmethod
    def of(cls, rows: DecodeRows, head: int, heads: slice, keep: KeepRule) -> _Head:
        dim = rows.query.shape[-1]
        columns = rows.projection[:, heads.start * dim : heads.stop * dim].float()
        return cls(
            heads,
            key=rows.key[head].float(),
            value=rows.value[head].float(),
            new_key=rows.new_key[head].float(),
            new_value=rows.new_value[head].float(),
            metric=columns.T @ columns,
            keep=keep,
        )


@dataclass(frozen=True)
class _View:
    """A prompt as a strategy stores it: logits of a block of rows, their weights relative to the
    densest token's, values."""

    logits: Float[Tensor, "group rows tokens"]
    weight: Float[Tensor, "group rows tokens"]
    value: Float[Tensor, "tokens dim"]


class _Judge:
    """Dense attention of one KV head's group, and what pruned variants of it lose."""

    def __init__(self, rows: DecodeRows, head: _Head) -> None:
        self.rows, self.key, self.value, self.metric = rows, head.key, head.value, head.metric
        self.query = rows.query[head.heads].float()
        self.logits = torch.matmul(self.query, self.key.T).mul_(rows.scaling)
        new = torch.matmul(self.query, head.new_key.T) * rows.scaling
        seen = torch.arange(len(head.new_key), device=new.device)[None] <= rows.positions[:, None]
        new = new.masked_fill(~seen, -torch.inf)
        self.new_peak = new.amax(-1, keepdim=True)
        new_weight = (new - self.new_peak).exp()
        self.new_sum = new_weight.sum(-1, keepdim=True)
        self.new_out = new_weight @ head.new_value
        self.peak = torch.maximum(self.new_peak, self.logits.amax(-1, keepdim=True))
        self.new_scale = (self.new_peak - self.peak).exp()
        exact = _View(self.logits, (self.logits - self.peak).exp_(), self.value)
        self._head, self._views = head, {EXACT_BITS: exact}
        self.dense = self._attend(self.logits, self.value)
        self.gradient = rows.gradient[:, head.heads].float().flatten(1)

    def view(self, bits: int) -> _View:
        """The prompt with residents of so many bits."""
        if bits not in self._views:
            key, value = self._head.stored(bits)
            logits = torch.matmul(self.query, key.T).mul_(self.rows.scaling)
            self._views[bits] = _View(logits, (logits - self.peak).exp_(), value)
        return self._views[bits]

    def _attend(self, logits: Tensor, value: Tensor) -> Tensor:
        """Attention over some prompt tokens and the new ones, each weighed from the joint peak.

        The peak is that of what is kept: were it the prompt's, kept weights could all be zero.
        """
        peak = self.new_peak
        if logits.shape[-1]:  # a keep rule without sinks and recent tokens may keep nothing
            peak = torch.maximum(peak, logits.amax(-1, keepdim=True))
        weight, new = (logits - peak).exp(), (self.new_peak - peak).exp()
        total = weight.sum(-1, keepdim=True) + new * self.new_sum
        return (weight @ value + new * self.new_out) / total

    def _attend_to(self, kept: Float[Tensor, "*group rows kept"], value: Tensor) -> Tensor | None:
        """As `_attend`, from weights that are there already; None where they are too small."""
        total = kept.sum(-1, keepdim=True) + self.new_scale * self.new_sum
        if bool((total < LEAST_TOTAL).any()):
            return None
        return (kept @ value + self.new_scale * self.new_out) / total

    def _loss(self, out: Tensor) -> Float[Tensor, " 3"]:
        change = (self.dense - out).transpose(0, 1).flatten(1)
        square = ((change @ self.metric) * change).sum(-1).clamp(min=0)
        square = square / self.rows.output_norm.clamp(min=1e-12) ** 2
        reply = (self.gradient * change).sum(-1) ** 2
        return torch.stack([square.sqrt().mean(), square.mean(), reply.mean()])

    def loss_of(self, weight: Tensor, logits: Callable[[], Tensor], value: Tensor) -> Tensor:
        """What attending to some prompt tokens costs; from `logits()` if weights are too small."""
        out = self._attend_to(weight, value)
        return self._loss(self._attend(logits(), value) if out is None else out)


@dataclass(frozen=True)
class _Static:
    """The kept set is fixed before decoding; None where it is the whole prompt. A share of 1 is
    kept exactly, whatever the strategy."""

    kept: tuple[Int[Tensor, " kept"] | None, ...]
    ratios: tuple[float, ...]
    bits: int

    @classmethod
    def of(
        cls,
        attention: Float[Tensor, "1 tokens"],
        strategy: Strategy,
        ratios: tuple[float, ...],
        keep: KeepRule,
        dim: int,
        itemsize: int,
        text: Bool[Tensor, " tokens"],
    ) -> _Static:
        ranking = rank_tokens(attention, strategy.pool, keep)[0]
        sizes = (len(ranking), keep, dim, itemsize)
        counts = [static_layout(strategy, ratio, *sizes).tokens for ratio in ratios]
        kept = tuple(
            None if n == len(ranking) else select_tokens(ranking, n, strategy, keep, text)
            for n in counts
        )
        return cls(kept, ratios, strategy.resident_bits)

    def losses(self, judge: _Judge) -> Float[Tensor, "ratios 3"]:
        """Of a block of rows; what keeps the same tokens as at the ratio before is judged once."""
        found: list[Tensor] = []
        for number, (ratio, kept) in enumerate(zip(self.ratios, self.kept, strict=True)):
            if ratio >= 1 or (kept is None and self.bits == EXACT_BITS):
                found.append(judge.value.new_zeros(3))
            elif number and self._size(number) == self._size(number - 1):
                found.append(found[-1])
            else:
                found.append(self._loss(judge, kept))
        return torch.stack(found)

    def _size(self, number: int) -> int | None:
        kept = self.kept[number]
        return None if kept is None else len(kept)

    def _loss(self, judge: _Judge, kept: Tensor | None) -> Tensor:
        view = judge.view(self.bits)
        own = slice(None) if kept is None else kept
        weight, value = view.weight[..., own], view.value[own]
        return judge.loss_of(weight, lambda: view.logits[..., own], value)


@dataclass(frozen=True)
class _Dynamic:
    """Every row selects its own chunks through the index; None where no chunk fits the prompt."""

    strategy: Strategy
    ratios: tuple[float, ...]
    layouts: tuple[DynamicLayout | None, ...]
    index: KeyIndex | None
    first: int
    end: int

    @classmethod
    def of(
        cls,
        key: Float[Tensor, "tokens dim"],
        strategy: Strategy,
        ratios: tuple[float, ...],
        keep: KeepRule,
        tables: HeadTables | None,
        positions: Positions | None,
        itemsize: int,
    ) -> _Dynamic:
        tokens, dim = key.shape
        sizes = (tokens, keep, dim, itemsize)
        layouts = tuple(dynamic_layout(strategy, ratio, *sizes) for ratio in ratios)
        whole = dynamic_layout(strategy, 1.0, *sizes)
        if whole is None:
            return cls(strategy, ratios, layouts, None, 0, 0)
        end = whole.sinks + whole.items * whole.chunk
        chunks = key[whole.sinks : end].view(whole.items, whole.chunk, dim)
        own = None if positions is None else positions.part(whole.sinks, whole.items)
        index = build_index(strategy, chunks, tables, own)
        return cls(strategy, ratios, layouts, index, whole.sinks, end)

    def losses(self, judge: _Judge) -> Float[Tensor, "ratios 3"]:
        """Of a block of rows."""
        ranking = None if self.index is None else self._ranking(judge, self.index)
        pairs = zip(self.ratios, self.layouts, strict=True)
        return torch.stack([self._loss(judge, ranking, *pair) for pair in pairs])

    def _loss(
        self, judge: _Judge, ranking: Ranking | None, ratio: float, layout: DynamicLayout | None
    ) -> Tensor:
        if ratio >= 1:
            return judge.value.new_zeros(3)
        if layout is None or ranking is None:
            return judge.value.new_full((3,), float(INFEASIBLE))
        mask = self._mask(judge, ranking.best(layout.hot, self.strategy.rerank))
        view = judge.view(self.strategy.resident_bits)
        logits = view.logits
        return judge.loss_of(
            view.weight * mask, lambda: logits.masked_fill(~mask, -torch.inf), view.value
        )

    def _ranking(self, judge: _Judge, index: KeyIndex) -> Ranking:
        score = index.score(judge.query.transpose(0, 1), judge.rows.scaling)
        view = judge.view(self.strategy.resident_bits)
        exact = view.logits[..., self.first : self.end].transpose(0, 1)
        return Ranking(score, exact if self.strategy.rerank else None)

    def _mask(self, judge: _Judge, best: Int[Tensor, "rows hot"]) -> Bool[Tensor, "rows tokens"]:
        """Which prompt tokens each row attends to."""
        chunk = self.strategy.chunk
        chosen = best.new_zeros(len(best), (self.end - self.first) // chunk, dtype=torch.bool)
        chosen.scatter_(-1, best, True)
        chosen |= judge.rows.exact[:, None]
        mask = best.new_ones(len(best), len(judge.key), dtype=torch.bool)
        mask[:, self.first : self.end] = chosen.repeat_interleave(chunk, dim=1)
        return mask
