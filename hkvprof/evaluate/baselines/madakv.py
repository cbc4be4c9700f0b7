"""MadaKV: every head decides how much of its room text gets and how much vision."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hkvprof.evaluate.baselines.base import PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import (
    POOL,
    best_tokens,
    recent_count,
    snapkv_scores,
    spread,
    with_recent,
)
from hkvprof.selection.static import pool

THETA = 0.9
"""Share of a modality's attention that its needed tokens cover."""
FLOOR = 0.8
"""Least share of an even budget that a layer gets."""


@baseline("madakv", "MadaKV-like", "arXiv 2506.15724")
def madakv(prompt: PromptView) -> Selection:
    """Modality preference per head, and budgets compensated between layers.

    A head's room is divided between text and vision as the attention of the last rows is, and it
    needs the fewest tokens that hold 0.9 of that attention in each. As published, a layer takes
    what its heads need and the ones after it share what that leaves; where the room is small,
    nothing is left for the last layers, so here layers get room in proportion to their needs, with
    a floor. The recent tokens (as text) always stay, and scores are pooled as SnapKV's.
    """
    weights = prompt.remember("madakv", lambda: [snapkv_scores(x, width=1) for x in prompt.layers])
    text = prompt.text.to(prompt.device)
    needs = [
        sum(_needed(row[part]) for row in weight for part in (text, ~text)) for weight in weights
    ]
    least = max(recent_count(prompt), int(FLOOR * prompt.room))
    counts = spread(prompt.room * len(needs), needs, least, prompt.tokens)
    selection: Selection = []
    for layer, weight, count in zip(prompt.layers, weights, counts, strict=True):
        score = with_recent(prompt, pool(weight, POOL))
        selection.append(
            [
                layer.keep(head, _divided(score[head], weight[head], text, count))
                for head in range(prompt.grid.kv_heads)
            ]
        )
    return selection


def _needed(attention: Float[Tensor, " tokens"]) -> int:
    """Fewest tokens that hold THETA of this attention."""
    covered = attention.sort(descending=True).values.cumsum(dim=0)
    return int((covered < THETA * attention.sum()).sum()) + 1 if len(attention) else 0


def _divided(
    score: Float[Tensor, " tokens"],
    attention: Float[Tensor, " tokens"],
    text: Bool[Tensor, " tokens"],
    count: int,
) -> Tensor:
    """The best of text and of vision, in the proportion of the attention they get."""
    forced = score.isinf()
    preference = float(attention[~text].sum() / attention.sum())
    free = count - int(forced.sum())
    vision = min(int(preference * free + 0.5), int((~text & ~forced).sum()))
    words = min(free - vision, int((text & ~forced).sum()))
    vision = free - words
    parts = [(~text & ~forced, vision), (text & ~forced, words)]
    chosen = [best_tokens(score, number, allowed) for allowed, number in parts]
    return torch.cat([forced.nonzero()[:, 0], *chosen])
