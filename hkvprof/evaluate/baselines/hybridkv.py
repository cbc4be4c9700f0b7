"""HybridKV as published: every request classifies its heads and prunes or retrieves."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hkvprof.calibration.decide import allocate_by_sparsity, types_by_sparsity
from hkvprof.evaluate.baselines.base import Choice, LayerPrompt, PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import rows, spread
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.profile.costs import dynamic_layout, token_floor
from hkvprof.runtime.plan import HeadPlan
from hkvprof.selection.sparsity import sample_text_rows, text_sparsity
from hkvprof.selection.static import rank_tokens, select_tokens, window_attention

THETA, KAPPA = 0.9, 0.02
"""A head is static when the top 2% of its tokens get 0.9 of the attention; 0.9 is published."""
KEEP = KeepRule(2, 4, 16)
PRUNED = Strategy(HeadType.STATIC, pool=1, text_prior=0.5)
CHUNKS = (16, 32, 64)


@baseline("hybridkv", "HybridKV (online)", "arXiv 2604.05887", keep=KEEP)
def hybridkv(prompt: PromptView) -> Selection:
    """Text-prior pruning for static groups, chunks behind their mean key for dynamic ones.

    Types come from this prompt's text rows, budgets from the top down: both types get the same
    mean, static heads in proportion to their sparsity, dynamic ones evenly. Dynamic heads take the
    smallest published chunk whose index fits into their share; where none does, they are pruned.
    """
    mean = prompt.remember("hybridkv", lambda: request_sparsity(prompt))
    return by_types(prompt, types_by_sparsity(mean, THETA, prompt.grid), mean)


def by_types(prompt: PromptView, types: NDArray[np.uint8], mean: NDArray[np.float32]) -> Selection:
    """HybridKV's budgets and selection for types [layers, kv_heads] and the sparsity of all query
    heads [layers, query_heads], wherever they come from."""
    grid, static = prompt.grid, types == HeadType.STATIC
    floor = min(prompt.share, token_floor(KEEP.floor_tokens, prompt.tokens))
    ratios = allocate_by_sparsity(types, mean, prompt.share, floor, grid).ratio
    plans = [_retrieval(prompt, float(r)) for r in ratios.flat]
    pruned = static.ravel() | np.array([plan is None for plan in plans])
    share = np.where(pruned, ratios.ravel().astype(np.float64), 0.0)
    counts = np.zeros(len(plans), dtype=int)
    if pruned.any():
        whole = int(share.sum() * prompt.tokens + 1e-6)
        counts[pruned] = spread(max(1, whole), share[pruned], 0, prompt.tokens)
    kept = [None if cut else plan for cut, plan in zip(pruned, plans, strict=True)]
    heads = grid.kv_heads
    per_layer = zip(rows(counts.tolist(), heads), rows(kept, heads), strict=True)
    return [
        _layer(prompt, layer, numbers, mine)
        for layer, (numbers, mine) in zip(prompt.layers, per_layer, strict=True)
    ]


def _layer(
    prompt: PromptView, layer: LayerPrompt, counts: list[int], plans: list[HeadPlan | None]
) -> list[Choice]:
    """Retrieval where there is a plan, else text-prior pruning to that many tokens."""
    attention = window_attention(layer.query[:, -KEEP.window :], layer.key, layer.scaling)
    ranking = rank_tokens(attention, PRUNED.pool, KEEP)
    return [
        plan or layer.keep(head, select_tokens(ranking[head], count, PRUNED, KEEP, prompt.text))
        for head, (count, plan) in enumerate(zip(counts, plans, strict=True))
    ]


def _retrieval(prompt: PromptView, ratio: float) -> HeadPlan | None:
    """A dynamic head with the smallest published chunk that fits into its share."""
    key = prompt.layers[0].key
    for chunk in CHUNKS:
        strategy = Strategy(HeadType.DYNAMIC, index="mean", chunk=chunk)
        size = key.shape[-1], prompt.itemsize
        if dynamic_layout(strategy, ratio, prompt.tokens, KEEP, *size) is not None:
            return HeadPlan(strategy, ratio)
    return None


def request_sparsity(prompt: PromptView) -> NDArray[np.float32]:
    """Text-centric sparsity of every query head, [layers, query_heads].

    A prompt that ends with its context has no text row that sees it: all rows count as text then.
    """
    text = prompt.text.to(prompt.device)
    at = sample_text_rows(text)
    if not len(at):
        at = sample_text_rows(torch.ones_like(text))
    found = [
        text_sparsity(x.query[:, at], x.key, at, x.scaling, (KAPPA,))[0] for x in prompt.layers
    ]
    return torch.stack(found).cpu().numpy()
