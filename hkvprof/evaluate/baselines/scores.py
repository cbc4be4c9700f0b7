"""What many methods share: attention of the last rows, and keeping the best-scored tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from hkvprof.evaluate.baselines.base import LayerPrompt, PromptView, Selection
from hkvprof.selection.static import pool, window_weights


def spread(total: int, weights: ArrayLike, least: int, most: int) -> list[int]:
    """`total` dealt out: `least` each, the rest in proportion to `weights`, nobody over `most`.

    What `most` turns away goes to the others in proportion. Where `total` does not even hold
    `least` for everyone, all get the same; only where it exceeds `most` for everyone is it not
    used up. Of the places after the comma, the largest are rounded up.
    """
    weight = np.asarray(weights, dtype=np.float64).ravel()
    count = len(weight)
    total = min(total, count * most)
    least = min(least, total // count)
    weight = np.maximum(weight, 1e-9 * max(float(weight.max()), 1e-30))
    low, high = 0.0, (most - least) / float(weight.min()) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if np.minimum(least + middle * weight, most).sum() <= total:
            low = middle
        else:
            high = middle
    exact = np.minimum(least + low * weight, most)
    whole = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-(exact - whole), kind="stable")
    while (left := total - int(whole.sum())) > 0:
        whole[order[whole[order] < most][:left]] += 1
    return [int(number) for number in whole]


T = TypeVar("T")


def rows(numbers: Sequence[T], width: int) -> list[list[T]]:
    """A flat list over all heads as one list per layer."""
    return [list(numbers[i : i + width]) for i in range(0, len(numbers), width)]


def best_of_all(
    score: Float[Tensor, "*heads tokens"], total: int, safe: int = 0
) -> Bool[Tensor, "*heads tokens"]:
    """Which tokens belong to the `total` best-scored of all heads; ties go to earlier ones.

    Every head's own `safe` best ones come first.
    """
    shape = score.shape
    score = score.reshape(-1, shape[-1]).clone()
    if safe:
        own = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :safe]
        score.scatter_(-1, own, torch.inf)
    order = torch.sort(score.flatten(), descending=True, stable=True).indices[:total]
    chosen = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    chosen[order] = True
    return chosen.view(shape)


def keep_marked(prompt: PromptView, marked: Sequence[Bool[Tensor, "kv_heads tokens"]]) -> Selection:
    """Every head keeps the tokens that are marked in its row."""
    return [
        [layer.keep(head, row.nonzero()[:, 0]) for head, row in enumerate(mark)]
        for layer, mark in zip(prompt.layers, marked, strict=True)
    ]


WINDOW = 16
"""Observation window: SnapKV's default of 64 does far worse where questions are short."""
POOL = 7
"""Pooling width of SnapKV-like scores."""
SINKS = 4


def observed(
    layer: LayerPrompt, window: int = WINDOW
) -> Float[Tensor, "query_heads window tokens"]:
    """Attention weights of the last `window` rows on all tokens, per query head, float32."""
    query = layer.query[:, -min(window, layer.query.shape[1]) :]
    return window_weights(query, layer.key, layer.scaling).flatten(0, 1)


def snapkv_scores(
    layer: LayerPrompt, window: int = WINDOW, width: int = POOL
) -> Float[Tensor, "kv_heads tokens"]:
    """SnapKV: mean over the window's rows and the group, average pooling over neighbours."""
    weights = observed(layer, window).mean(dim=1)
    return pool(weights.view(len(layer.key), -1, weights.shape[-1]).mean(dim=1), width)


def with_recent(
    prompt: PromptView, score: Float[Tensor, "*heads tokens"], window: int = WINDOW
) -> Float[Tensor, "*heads tokens"]:
    """A copy in which the last `window` tokens score infinity: they stay.

    Where they would take more than half of the room, only as many as half of it holds.
    """
    score = score.clone()
    score[..., prompt.tokens - recent_count(prompt, window) :] = torch.inf
    return score


def recent_count(prompt: PromptView, window: int = WINDOW) -> int:
    """How many recent tokens `with_recent` keeps."""
    return min(window, max(1, prompt.room // 2))


def best_tokens(
    score: Float[Tensor, " tokens"],
    count: int,
    allowed: Bool[Tensor, " tokens"] | None = None,
) -> Int[Tensor, " count"]:
    """The `count` best-scored tokens, ascending; ties go to the earlier one.

    `allowed` restricts the choice; fewer come back where fewer are allowed.
    """
    if allowed is not None:
        places = allowed.nonzero()[:, 0]
        return places[best_tokens(score[places], count)]
    order = torch.sort(score, descending=True, stable=True).indices
    return order[: min(count, len(score))].sort().values


def keep_best(
    prompt: PromptView, scores: list[Float[Tensor, "kv_heads tokens"]], counts: list[list[int]]
) -> Selection:
    """Every head keeps its `counts[layer][head]` best-scored tokens."""
    return [
        [layer.keep(head, best_tokens(score[head], count)) for head, count in enumerate(numbers)]
        for layer, score, numbers in zip(prompt.layers, scores, counts, strict=True)
    ]


def same_room(prompt: PromptView) -> list[list[int]]:
    """`room` tokens for every head of every layer."""
    return [[prompt.room] * prompt.grid.kv_heads for _ in prompt.layers]


def snapkv_of(prompt: PromptView) -> list[Float[Tensor, "kv_heads tokens"]]:
    """SnapKV's scores of every layer, the recent tokens at infinity."""
    scores = prompt.remember("snapkv", lambda: [snapkv_scores(layer) for layer in prompt.layers])
    return [with_recent(prompt, score) for score in scores]


def with_sinks(
    prompt: PromptView, score: Float[Tensor, "*heads tokens"]
) -> Float[Tensor, "*heads tokens"]:
    """A copy in which the first 4 tokens score infinity (no more than half of the room)."""
    score = score.clone()
    score[..., : min(SINKS, max(1, prompt.room // 2))] = torch.inf
    return score
