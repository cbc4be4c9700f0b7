"""Drift of one layer: do decoding and later questions attend to what the prompt's end attends to?

A static head is pruned by what the prompt's last rows look at. Where the tokens that decoding or a
later question would keep are others, it has lost them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hkvprof.head_statistics import PAIRS
from hkvprof.heads import KeepRule
from hkvprof.policy.text_rows import attention_blocks

SHARE = 0.10
"""Of the tokens between sinks and recent ones: what a kept set holds."""


@dataclass(frozen=True)
class Phase:
    """Rows that look at a prompt: `query` [query_heads, rows, dim] at `rows`, ascending positions
    in prompt and continuation; perhaps none."""

    query: Float[Tensor, "query_heads rows dim"]
    rows: Int[Tensor, " rows"]


def compared(phases: Sequence[Phase]) -> Bool[Tensor, " pairs"]:
    """Which of PAIRS have rows on both sides."""
    return torch.tensor([bool(len(a.rows) and len(b.rows)) for a, b in combinations(phases, 2)])


def layer_drift(
    phases: Sequence[Phase],
    key: Float[Tensor, "kv_heads all dim"],
    tokens: int,
    scaling: float,
    keep: KeepRule,
) -> Float[Tensor, "pairs query_heads"]:
    """Shared part of the kept sets of the three phases of PAIRS; 0 for a pair that is not there.

    `key` holds prompt (`tokens`) and continuation. By chance it is SHARE.
    """
    heads = len(phases[0].query)
    group = heads // len(key)
    result = torch.zeros(len(PAIRS), heads, device=key.device)
    for owner in range(len(key)):
        keys = key[owner].float()
        for head in range(owner * group, (owner + 1) * group):
            sets = [kept_set(phase, head, keys, tokens, scaling, keep) for phase in phases]
            for number, (first, second) in enumerate(combinations(sets, 2)):
                if first is not None and second is not None:
                    result[number, head] = (first & second).sum() / first.sum()
    return result


def kept_set(
    phase: Phase,
    head: int,
    key: Float[Tensor, "all dim"],
    tokens: int,
    scaling: float,
    keep: KeepRule,
) -> Bool[Tensor, " candidates"] | None:
    """Which tokens between sinks and recent ones a query head alone would keep; None without rows.

    Scored as the runtime scores (policy.static): softmax per row, maximum over rows. Sinks and
    recent tokens are always kept, and left out: they would make all sets alike.
    """
    if not len(phase.rows):
        return None
    score = key.new_zeros(tokens)
    for block in attention_blocks(phase.query[head : head + 1], key, phase.rows, scaling):
        share = block.weight[:, :tokens].div_(block.total[:, None]).amax(dim=0)
        score[: len(share)] = torch.maximum(score[: len(share)], share)
    score = score[keep.sinks : tokens - keep.recent]
    best = score.topk(math.ceil(SHARE * len(score))).indices
    return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, best, True)
