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
    rows = query.shape[1]
    if new is None:
        return _attend(query, key, value, scaling, None)
    mask = torch.ones(rows, len(key), dtype=torch.bool, device=key.device)
    mask[:, len(key) - rows :] = new
    return _attend(query, key, value, scaling, mask)


def attend_where(
    query: Float[Tensor, "group rows dim"],
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    scaling: float,
    visible: Bool[Tensor, "rows tokens"],
) -> Float[Tensor, "group rows dim"]:
    """The same, where row i sees the tokens that `visible[i]` marks; zeros where it sees none.

    Values of tokens that no row sees do not matter, NaN and infinity included.
    """
    seen = visible.any(dim=0)
    value = torch.where(seen[:, None], value, 0.0)
    key = torch.where(seen[:, None], key, 0.0)
    out = _attend(query, key, value, scaling, visible)
    return torch.where(visible.any(dim=1)[:, None], out, 0.0)


def _attend(
    query: Float[Tensor, "group rows dim"],
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    scaling: float,
    visible: Bool[Tensor, "rows tokens"] | None,
) -> Float[Tensor, "group rows dim"]:
    group, rows, dim = query.shape
    mask = None if visible is None else visible.repeat(group, 1)[None, None]
    out = F.scaled_dot_product_attention(
        query.reshape(1, 1, group * rows, dim),
        key[None, None],
        value[None, None],
        attn_mask=mask,
        scale=scaling,
    )
    return out.view(group, rows, value.shape[-1])
