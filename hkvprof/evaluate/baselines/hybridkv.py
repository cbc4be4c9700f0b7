"""HybridKV as published: every request classifies its heads and prunes or retrieves."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.evaluate.baselines.base import Choice, LayerPrompt, Prompt, Selection, baseline
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.policy.budget import token_floor
from hkvprof.policy.costs import dynamic_layout
from hkvprof.policy.static import rank_tokens, select_tokens, window_attention
from hkvprof.profile.classify import allocate_by_sparsity
from hkvprof.profile.statistics import sample_text_rows, text_sparsity
from hkvprof.runtime.plan import HeadPlan

THETA, KAPPA = 0.9, 0.1
"""A head is static when its top tenth of tokens gets 0.9 of the attention; 0.9 is published."""
KEEP = KeepRule(2, 4, 16)
PRUNED = Strategy(HeadType.STATIC, pool=1, text_prior=0.5)
CHUNKS = (16, 32, 64)


@baseline("hybridkv", "HybridKV (online)", "arXiv 2604.05887", keep=KEEP)
def hybridkv(prompt: Prompt) -> Selection:
    """Text-prior pruning for static groups, chunks behind their mean key for dynamic ones.

    Types come from this prompt's text rows, budgets from the top down: both types get the same
    mean, static heads in proportion to their sparsity, dynamic ones evenly. Dynamic heads take the
    smallest published chunk whose index fits into their share; where none does, they are pruned.
    """
    grid = prompt.grid
    mean = prompt.remember("hybridkv", lambda: _sparsity(prompt))
    static = (mean >= THETA).reshape(grid.layers, grid.kv_heads, grid.group).all(axis=-1)
    types = np.where(static, HeadType.STATIC, HeadType.DYNAMIC).astype(np.uint8)
    floor = min(prompt.share, token_floor(KEEP.floor_tokens, prompt.tokens))
    ratios = allocate_by_sparsity(types, mean, prompt.share, floor, grid).ratio
    selection: Selection = []
    for number, layer in enumerate(prompt.layers):
        ranking = rank_tokens(
            window_attention(layer.query[:, -KEEP.window :], layer.key, layer.scaling), 1, KEEP
        )
        selection.append(
            [
                _choice(
                    prompt, layer, head, ranking[head], float(ratio), bool(static[number, head])
                )
                for head, ratio in enumerate(ratios[number])
            ]
        )
    return selection


def _sparsity(prompt: Prompt) -> NDArray[np.float32]:
    """Text-centric sparsity of every query head, [layers, query_heads]."""
    rows = sample_text_rows(prompt.text.to(prompt.device))
    found = [
        text_sparsity(x.query[:, rows], x.key, rows, x.scaling, (KAPPA,))[0] for x in prompt.layers
    ]
    return torch.stack(found).cpu().numpy()


def _choice(
    prompt: Prompt, layer: LayerPrompt, head: int, ranking: Tensor, ratio: float, static: bool
) -> Choice:
    if not static:
        for chunk in CHUNKS:
            strategy = Strategy(HeadType.DYNAMIC, index="mean", chunk=chunk)
            key = layer.key
            size = key.shape[-1], key.element_size()
            if dynamic_layout(strategy, ratio, prompt.tokens, KEEP, *size) is not None:
                return HeadPlan(strategy, ratio)
    count = max(1, int(ratio * prompt.tokens + 1e-6))
    return layer.keep(head, select_tokens(ranking, count, PRUNED, KEEP, prompt.text))
