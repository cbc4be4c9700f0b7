"""DuoAttention: some heads keep everything, the others sinks and recent tokens."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from hkvprof.evaluate.baselines.base import Prompt, Selection, baseline
from hkvprof.evaluate.baselines.budgets import rows
from hkvprof.evaluate.baselines.offline import full_heads, habits
from hkvprof.evaluate.baselines.scores import SINKS

LOCAL = 20
"""Tokens that a streaming head holds at least, sinks included (no more than half of the room)."""


@baseline("duo_attention", "DuoAttention-like", "arXiv 2410.10819")
def duo_attention(prompt: Prompt) -> Selection:
    """As many whole heads as there is room for, those first that streaming hurts most.

    Published gates are trained; here a head's is the change of its layer's output on repeated
    random tokens when it streams, measured once per model.
    """
    loss = habits(prompt, SINKS, LOCAL - SINKS).streaming.flatten()
    rank = torch.sort(loss, descending=True, stable=True).indices.tolist()
    _, counts = full_heads(prompt, rank, min(LOCAL, max(1, prompt.room // 2)))
    return [
        [layer.keep(head, ends(prompt, count)) for head, count in enumerate(numbers)]
        for layer, numbers in zip(prompt.layers, rows(counts, prompt.grid.kv_heads), strict=True)
    ]


def ends(prompt: Prompt, count: int) -> Int[Tensor, " count"]:
    """The first 4 tokens (at most half of the count) and the last ones."""
    sinks = min(SINKS, count // 2)
    recent = torch.arange(prompt.tokens - (count - sinks), prompt.tokens)
    return torch.cat([torch.arange(sinks), recent]).to(prompt.device)
