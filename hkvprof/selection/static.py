"""Which prompt tokens a static head keeps. Pure functions; calibration and runtime share them.

Text-prior pruning (HybridKV, stage 3): sinks and recent tokens always, then the tokens that the
last text rows attend to most. Scores: softmax per query head, maximum over the observation window,
mean over the group, average pooling over neighbours (method: docs/method.md). A calibrated score
asks the queries of the calibration in place of the window's rows, and takes their weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hkvprof.heads import KeepRule, Strategy
from hkvprof.profile.queries import QueryTables
from hkvprof.selection.rotary import turned


def window_attention(
    query: Float[Tensor, "query_heads window dim"],
    key: Float[Tensor, "kv_heads tokens dim"],
    scaling: float,
    visible: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, "kv_heads tokens"]:
    """Attention of the last `window` prompt rows on every token: max over rows, mean over group.

    float32. Tokens that a mask hides, where `visible` is given, get none and give none.
    """
    weights = window_weights(query, key, scaling, visible)
    if visible is not None:
        rows = visible[len(visible) - query.shape[1] :]
        weights = torch.where(rows[:, None], weights, 0.0)
    return weights.amax(dim=2).mean(dim=1)


@dataclass(frozen=True)
class QueryCentres:
    """What queries after a prompt look like to one KV head, by the calibration.

    `centres` [group, centres, dim] float32 as at position 0, `weights` [group, centres] float32,
    their shares of the queries; `frequency` [pairs] float32, by which rotary embeddings turn them.
    """

    centres: Float[Tensor, "group centres dim"]
    weights: Float[Tensor, "group centres"]
    frequency: Float[Tensor, " pairs"]

    @classmethod
    def load(
        cls, tables: QueryTables, layer: int, heads: slice, device: torch.device
    ) -> QueryCentres:
        """Those of the query `heads` of one KV head on `device`."""
        parts = tables.centres[layer, heads], tables.weights[layer, heads], tables.frequency
        return cls(*(torch.from_numpy(part.astype("float32")).to(device) for part in parts))

    def tensors(self) -> tuple[Tensor, ...]:
        """The device tensors, for counting their bytes."""
        return (self.centres, self.weights, self.frequency)

    def attention(
        self,
        key: Float[Tensor, "1 tokens dim"],
        position: int,
        scaling: float,
        visible: Bool[Tensor, " tokens"] | None = None,
    ) -> Float[Tensor, "1 tokens"]:
        """Attention of the centres, standing at `position`, on every key: weighted mean over the
        centres, mean over the group.

        float32. Tokens that a mask hides, where `visible` is given, get none.
        """
        query = turned(self.centres, position * self.frequency)
        logits = torch.matmul(query, key.float().transpose(1, 2)) * scaling
        if visible is not None:
            logits.masked_fill_(~visible, -torch.inf)
        shared = self.weights[..., None] * logits.softmax(dim=-1)
        return shared.sum(dim=1).mean(dim=0, keepdim=True)


def window_weights(
    query: Float[Tensor, "query_heads window dim"],
    key: Float[Tensor, "kv_heads tokens dim"],
    scaling: float,
    visible: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, "kv_heads group window tokens"]:
    """Attention weights of the last `window` prompt rows, float32.

    Row j sees tokens up to tokens - window + j, of these the `visible` ones alone; NaN for rows
    that see none.
    """
    kv_heads, tokens, dim = key.shape
    window = query.shape[1]
    grouped = query.reshape(kv_heads, -1, dim).float()
    logits = torch.matmul(grouped, key.float().transpose(1, 2)) * scaling
    logits = logits.view(kv_heads, -1, window, tokens)
    future = torch.ones(window, tokens, dtype=torch.bool, device=key.device)
    logits.masked_fill_(future.triu(tokens - window + 1), -torch.inf)
    if visible is not None:
        logits.masked_fill_(~visible, -torch.inf)
    return logits.softmax(dim=-1)


def pool(score: Float[Tensor, "*heads tokens"], width: int) -> Float[Tensor, "*heads tokens"]:
    """Average over `width` neighbours (odd), borders averaged over what exists."""
    if width == 1:
        return score
    flat = score.reshape(1, -1, score.shape[-1])
    pooled = F.avg_pool1d(flat, width, stride=1, padding=width // 2, count_include_pad=False)
    return pooled.view_as(score)


def rank_tokens(
    attention: Float[Tensor, "kv_heads tokens"],
    pool_width: int,
    keep: KeepRule,
) -> Int[Tensor, "kv_heads tokens"]:
    """Token numbers in order of preference: a head that keeps k tokens keeps the first k.

    Sinks and recent tokens come first (in any order among themselves), then by pooled score. Ties
    go to the earlier token. NaN scores count as zero.
    """
    score = pool(torch.nan_to_num(attention, nan=0.0), pool_width)
    tokens = score.shape[-1]
    score = score.clone()
    score[:, : min(keep.sinks, tokens)] = torch.inf
    score[:, max(0, tokens - keep.recent) :] = torch.inf
    return torch.sort(score, dim=-1, descending=True, stable=True).indices


def select_tokens(
    ranking: Int[Tensor, " tokens"],
    count: int,
    strategy: Strategy,
    keep: KeepRule,
    text: Bool[Tensor, " tokens"] | None = None,
) -> Int[Tensor, " count"]:
    """The `count` tokens to keep, ascending; `ranking` is one row of `rank_tokens`.

    With a text prior, text tokens (in ranking order) may claim up to that share of the count
    before the ranking decides over the rest.
    """
    chosen = ranking[:count]
    if strategy.text_prior and text is not None and count < len(ranking):
        forced = ranking[: min(count, keep.sinks + keep.recent)]
        rest = ranking[len(forced) :]
        is_text = text.to(rest.device)[rest]
        room = min(int(strategy.text_prior * count), count - len(forced))
        first = rest[is_text][:room]
        others = rest[~torch.isin(rest, first)]
        chosen = torch.cat([forced, first, others])[:count]
    return chosen.sort().values
