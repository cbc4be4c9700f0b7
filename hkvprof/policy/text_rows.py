"""Text-centric sparsity (HybridKV, stage 1). Pure functions; calibration and runtime share them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hkvprof.lazy import no_triton

MOST_ROWS = 64


def sample_text_rows(text: Bool[Tensor, " tokens"], limit: int = MOST_ROWS) -> Int[Tensor, " rows"]:
    """Up to `limit` text positions, evenly spread, from the first non-text position on.

    Falls back to all text rows where the prompt is text alone.
    """
    others = (~text).nonzero()[:, 0]
    after = int(others[0]) if len(others) else 0
    rows = text.nonzero()[:, 0]
    rows = rows[rows >= after]
    if len(rows) <= limit:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, limit, device=rows.device).long()]


def text_sparsity(
    query: Float[Tensor, "query_heads rows dim"],
    key: Float[Tensor, "kv_heads tokens dim"],
    rows: Int[Tensor, " rows"],
    scaling: float,
    kappas: tuple[float, ...],
) -> Float[Tensor, "kappas query_heads"]:
    """Text-centric sparsity (HybridKV, stage 1): mean over text rows of the top-k attention mass.

    Row i sees its i + 1 first tokens; k = ceil(kappa * (i + 1)). On CUDA with triton the weights
    are counted in bins (triton_mass), elsewhere they are sorted.
    """
    group = len(query) // len(key)
    visible = torch.arange(key.shape[1], device=key.device)[None] <= rows[:, None]
    seen = rows + 1
    most = max(1, math.ceil(max(kappas) * int(seen.max())))
    counts = torch.stack([(kappa * seen).ceil().long().clamp(1, most) for kappa in kappas])
    if key.is_cuda and not no_triton():
        from hkvprof.policy.triton_mass import top_mass

        return top_mass(query, key, rows, scaling, counts)
    result = []
    for head in range(len(key)):
        block = query[head * group : (head + 1) * group].float()
        logits = torch.matmul(block, key[head].float().T) * scaling
        weights = logits.masked_fill_(~visible, -torch.inf).softmax(dim=-1)
        mass = weights.topk(most, dim=-1).values.cumsum(dim=-1)
        picked = torch.stack(
            [mass.gather(-1, (c - 1).expand(group, -1)[..., None]) for c in counts]
        )
        result.append(picked[..., 0].mean(dim=-1))
    return torch.cat(result, dim=-1)
