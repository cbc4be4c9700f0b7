"""SnapKV, whose tokens but the recent ones are kept in 4 bits: more of them for the same bytes."""

from __future__ import annotations

import torch

from hkvprof.evaluate.baselines.base import (
    Choice,
    Kept,
    LayerPrompt,
    PromptView,
    Selection,
    baseline,
)
from hkvprof.evaluate.baselines.codes import group_bytes
from hkvprof.evaluate.baselines.kivi import GROUP, with_coded_keys, with_coded_values
from hkvprof.evaluate.baselines.scores import best_tokens, recent_count, snapkv_of

BITS = 4


@baseline(
    "snapkv_int4", "SnapKV with KIVI-like residents in 4 bits", "arXiv 2404.14469, 2402.02750"
)
def snapkv_int4(prompt: PromptView) -> Selection:
    """The observation window in 16 bits; before it the best-scored tokens in 4 bits."""
    recent = recent_count(prompt)
    old = most_coded(prompt, recent)
    scores = snapkv_of(prompt)
    return [
        [_head(prompt, layer, head, score[head], recent, old) for head in range(len(layer.key))]
        for layer, score in zip(prompt.layers, scores, strict=True)
    ]


def most_coded(prompt: PromptView, recent: int) -> int:
    """How many tokens fit into a head's share in 4 bits beside the recent ones."""
    dim = prompt.grid.head_dim
    room = prompt.share * prompt.tokens * prompt.token_bytes - recent * prompt.token_bytes
    low, high = 0, prompt.tokens - recent
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if coded_bytes(middle, dim) <= room else (low, middle - 1)
    return low


def coded_bytes(tokens: int, dim: int) -> int:
    """Bytes of so many coded tokens of one head, scales and least values included."""
    return group_bytes(dim, tokens, BITS, GROUP) + group_bytes(tokens, dim, BITS, GROUP)


def _head(
    prompt: PromptView, layer: LayerPrompt, head: int, score: torch.Tensor, recent: int, old: int
) -> Choice:
    """One head: coded tokens in the order of their positions, then the recent ones as they are."""
    kept = best_tokens(score, old + recent)
    key = with_coded_keys(layer.key[head, kept][None], old, BITS)[0]
    value = with_coded_values(layer.value[head, kept][None], old, BITS)[0]
    return Kept(key, value, coded_bytes(old, key.shape[-1]) + recent * prompt.token_bytes)
