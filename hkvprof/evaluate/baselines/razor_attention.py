"""RazorAttention: retrieval heads keep everything, the others their ends and one mean token."""

from __future__ import annotations

import torch

from hkvprof.evaluate.baselines.base import Kept, LayerPrompt, PromptView, Selection, baseline
from hkvprof.evaluate.baselines.duo_attention import LOCAL, ends
from hkvprof.evaluate.baselines.offline import Habits, full_heads, habits
from hkvprof.evaluate.baselines.scores import rows

INDUCTION_HEADS, ECHO_HEADS = 14, 1
"""Heads are taken in the proportion of the published shares, 14% and 1%."""


@baseline("razor_attention", "RazorAttention-like", "arXiv 2407.15891")
def razor_attention(prompt: PromptView) -> Selection:
    """As many retrieval heads as there is room for; compensation tokens in the others.

    A compensation token is the mean of the dropped keys and values. As published it weighs as much
    as the tokens it stands for; a cache of keys and values cannot say so, and it weighs as one.
    """
    rank = ranked(habits(prompt))
    full, counts = full_heads(prompt, rank, min(LOCAL, max(2, prompt.room // 2)))
    heads = prompt.grid.kv_heads
    return [
        [
            layer.keep(head, torch.arange(prompt.tokens, device=prompt.device))
            if number * heads + head in full
            else compensated(prompt, layer, head, count)
            for head, count in enumerate(numbers)
        ]
        for number, (layer, numbers) in enumerate(
            zip(prompt.layers, rows(counts, heads), strict=True)
        )
    ]


def ranked(known: Habits) -> list[int]:
    """Heads in order: 14 induction heads for every echo head."""
    place = torch.full_like(known.echo.flatten(), torch.inf)
    for score, share in ((known.induction, INDUCTION_HEADS), (known.echo, ECHO_HEADS)):
        order = torch.sort(score.flatten(), descending=True, stable=True).indices
        rank = torch.empty_like(place)
        rank[order] = torch.arange(1, len(order) + 1) / share
        place = torch.minimum(place, rank)
    return torch.sort(place, stable=True).indices.tolist()


def compensated(prompt: PromptView, layer: LayerPrompt, head: int, count: int) -> Kept:
    """Sinks and recent tokens of one head, and the mean of the others in the place of one."""
    if count >= prompt.tokens:
        return layer.keep(head, ends(prompt, prompt.tokens))
    kept = ends(prompt, count - 1)
    dropped = torch.ones(prompt.tokens, dtype=torch.bool, device=prompt.device)
    dropped[kept] = False
    key, value = (
        torch.cat([x[dropped].float().mean(dim=0, keepdim=True).to(x.dtype), x[kept]])
        for x in (layer.key[head], layer.value[head])
    )
    return Kept(key, value)
