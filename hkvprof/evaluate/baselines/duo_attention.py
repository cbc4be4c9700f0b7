"""DuoAttention: some heads keep everything, the others sinks and recent tokens."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from hkvprof.evaluate.baselines.base import PromptView, Selection, baseline
from hkvprof.evaluate.baselines.offline import full_heads, static_loss
from hkvprof.evaluate.baselines.scores import SINKS, rows

LOCAL = 20
"""Tokens that a streaming head holds at least, sinks included (no more than half of the room)."""


@baseline("duo_attention", "DuoAttention-like", "arXiv 2410.10819", needs_profile=True)
def duo_attention(prompt: PromptView) -> Selection:
    """As many whole heads as there is room for, those first that lose most when pruned.

    Published gates are trained on passkeys; here the profile orders the heads, by the loss of a
    static head on calibration samples.
    """
    loss = torch.from_numpy(static_loss(prompt.need_profile("duo_attention"))).flatten()
    rank = torch.sort(loss, descending=True, stable=True).indices.tolist()
    _, counts = full_heads(prompt, rank, min(LOCAL, max(1, prompt.room // 2)))
    return [
        [layer.keep(head, ends(prompt, count)) for head, count in enumerate(numbers)]
        for layer, numbers in zip(prompt.layers, rows(counts, prompt.grid.kv_heads), strict=True)
    ]


def ends(prompt: PromptView, count: int) -> Int[Tensor, " count"]:
    """The first 4 tokens (at most half of the count) and the last ones."""
    sinks = min(SINKS, count // 2)
    recent = torch.arange(prompt.tokens - (count - sinks), prompt.tokens)
    return torch.cat([torch.arange(sinks), recent]).to(prompt.device)
