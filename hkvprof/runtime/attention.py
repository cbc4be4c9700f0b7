"""Attention over ragged segments: the reference implementation in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def attend(
    query: Float[Tensor, "group rows dim"],
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    scaling: float,
    new: Bool[Tensor, "rows rows"] | None = None,
) -> Float[Tensor, "group rows dim"]:
    """One KV head's attention of a group of query heads.

    Every row sees all tokens except, where `new` is given, the last `rows` tokens, of which row i
    sees those that `new[i]` marks (causality among the rows of this pass).
    """
    group, rows, dim = query.shape
    mask = None
    if new is not None:
        mask = torch.ones(rows, len(key), dtype=torch.bool, device=key.device)
        mask[:, len(key) - rows :] = new
        mask = mask.repeat(group, 1)[None, None]
    out = F.scaled_dot_product_attention(
        query.reshape(1, 1, group * rows, dim),
        key[None, None],
        value[None, None],
        attn_mask=mask,
        scale=scaling,
    )
    return out.view(group, rows, value.shape[-1])
