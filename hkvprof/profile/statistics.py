"""Per-sample statistics of one layer: loss curves.

Everything works on one layer and one KV head's group at a time, so that no tensor grows with
heads x rows x tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.policy.budget import INFEASIBLE
from hkvprof.policy.costs import dynamic_layout, static_tokens
from hkvprof.policy.index import HeadTables, Ranking, build_index
from hkvprof.policy.static import rank_tokens, select_tokens, window_attention

LEAST_TOTAL = 1e-20
"""Below this sum of weights relative to the densest token's, they are formed anew."""


@dataclass(frozen=True)
class DecodeRows:
    """One layer's view of the decoding rows to be judged (batch of one, R rows, T new tokens).

    `query` [query_heads, R, dim]; `key`/`value` [kv_heads, tokens, dim] of the prompt and
    `new_key`/`new_value` [kv_heads, T, dim] of the continuation; row r sees the new tokens up to
    `positions[r]`; `gradient` [R, query_heads, dim] of the reply's margin, over the margin itself;
    `projection` W_O [hidden, query_heads * dim]; `output_norm` [R] of the layer's attention output;
    `exact` [R].
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
) -> LayerLosses:
    """Loss curves of all KV heads of a layer, decided by the runtime's own selection code.

    `tables[(head, bits)]` are the projected-index constants. INFEASIBLE where a dynamic strategy's
    fixed bytes exceed the ratio.
    """
    attention = window_attention(window_query, rows.key, rows.scaling)
    per_head = []
    for head in range(len(rows.key)):
        judge = _HeadJudge(rows, head)
        curves = []
        for strategy in strategies:
            if strategy.head_type is HeadType.STATIC:
                ranking = rank_tokens(attention[head : head + 1], strategy.pool, keep)[0]
                curves.append(judge.static(ranking, strategy, ratios, keep, text))
            else:
                table = tables.get((head, strategy.bits))
                curves.append(judge.dynamic(strategy, ratios, keep, table, itemsize))
        per_head.append(torch.stack(curves))
    stacked = torch.stack(per_head, dim=1)
    return LayerLosses(stacked[..., 0], stacked[..., 1], stacked[..., 2])


class _HeadJudge:
    """Dense attention of one KV head's group, and what pruned variants of it lose."""

    def __init__(self, rows: DecodeRows, head: int) -> None:
        self.rows = rows
        self.group = len(rows.query) // len(rows.key)
        mine = slice(head * self.group, (head + 1) * self.group)
        self.query = rows.query[mine].float()
        self.key, self.value = rows.key[head].float(), rows.value[head].float()
        new_key, new_value = rows.new_key[head].float(), rows.new_value[head].float()
        self.logits = torch.matmul(self.query, self.key.T) * rows.scaling
        new = torch.matmul(self.query, new_key.T) * rows.scaling
        seen = torch.arange(len(new_key), device=new.device)[None] <= rows.positions[:, None]
        new = new.masked_fill(~seen, -torch.inf)
        self.new_peak = new.amax(-1, keepdim=True)
        new_weight = (new - self.new_peak).exp()
        self.new_sum = new_weight.sum(-1, keepdim=True)
        self.new_out = new_weight @ new_value
        peak = torch.maximum(self.new_peak, self.logits.amax(-1, keepdim=True))
        self.weight = (self.logits - peak).exp()
        self.new_scale = (self.new_peak - peak).exp()
        self.dense = self._attend(self.logits, self.value)
        dim = self.query.shape[-1]
        columns = rows.projection[
            :, head * self.group * dim : (head + 1) * self.group * dim
        ].float()
        self.metric = columns.T @ columns
        self.gradient = rows.gradient[:, mine].float().flatten(1)

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

    def static(
        self,
        ranking: Int[Tensor, " tokens"],
        strategy: Strategy,
        ratios: tuple[float, ...],
        keep: KeepRule,
        text: Bool[Tensor, " tokens"],
    ) -> Float[Tensor, "ratios 3"]:
        """Losses when the kept set is fixed before decoding."""
        curve = []
        for ratio in ratios:
            count = static_tokens(ratio, len(self.key), keep)
            if count == len(self.key):
                curve.append(torch.zeros(3, device=self.key.device))
                continue
            kept = select_tokens(ranking, count, strategy, keep, text)
            value = self.value[kept]
            out = self._attend_to(self.weight[..., kept], value)
            if out is None:
                out = self._attend(self.logits[..., kept], value)
            curve.append(self._loss(out))
        return torch.stack(curve)

    def dynamic(
        self,
        strategy: Strategy,
        ratios: tuple[float, ...],
        keep: KeepRule,
        tables: HeadTables | None,
        itemsize: int,
    ) -> Float[Tensor, "ratios 3"]:
        """Losses when every row selects its own chunks through the index."""
        tokens, dim = self.key.shape
        layout = dynamic_layout(strategy, 1.0, tokens, keep, dim, itemsize)
        device = self.key.device
        if layout is None:
            curve = torch.full((len(ratios), 3), float(INFEASIBLE), device=device)
            curve[torch.tensor(ratios, device=device) >= 1] = 0
            return curve
        end = layout.sinks + layout.items * layout.chunk
        chunks = self.key[layout.sinks : end].view(layout.items, layout.chunk, dim)
        index = build_index(strategy, chunks, tables)
        score = index.score(self.query.transpose(0, 1), self.rows.scaling)
        exact = self.logits[..., layout.sinks : end].transpose(0, 1)
        ranking = Ranking(score, exact if strategy.rerank else None)
        curve_rows = []
        for ratio in ratios:
            layout = dynamic_layout(strategy, ratio, tokens, keep, dim, itemsize)
            if ratio >= 1:
                curve_rows.append(torch.zeros(3, device=device))
            elif layout is None:
                curve_rows.append(torch.full((3,), float(INFEASIBLE), device=device))
            else:
                best = ranking.best(layout.hot, strategy.rerank)
                chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
                chosen |= self.rows.exact[:, None]
                mask = torch.ones(len(chosen), tokens, dtype=torch.bool, device=device)
                mask[:, layout.sinks : end] = chosen.repeat_interleave(layout.chunk, dim=1)
                out = self._attend_to(self.weight * mask, self.value)
                if out is None:
                    out = self._attend(self.logits.masked_fill(~mask, -torch.inf), self.value)
                curve_rows.append(self._loss(out))
        return torch.stack(curve_rows)
