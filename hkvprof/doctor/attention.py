"""Attention by its definition, in float64: what the runtime's results are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_KERNEL_EPS = 4 * torch.finfo(torch.float32).eps
"""What exponentials and sums of a kernel that computes in float32 add to rounding."""


@dataclass(frozen=True)
class Exact:
    """`output` [rows, new, query_heads, dim]; `size` [rows, new, query_heads] is the length that
    an attended value has on (weighted) average; `sharpness` the largest logit's magnitude."""

    output: Tensor
    size: Tensor
    sharpness: Tensor

    def error(self, found: Float[Tensor, "rows new query_heads dim"]) -> Tensor:
        """Distance of `found` from the output over the size of what was averaged."""
        distance = (found.double() - self.output).norm(dim=-1)
        return (distance / self.size.clamp(min=1e-30)).nan_to_num(torch.inf)

    def tolerance(self, dtype: torch.dtype) -> Tensor:
        """Error that rounding in `dtype` may cause: products and sums round, and an error of a
        logit becomes one of its weight."""
        return (torch.finfo(dtype).eps + _KERNEL_EPS) * (1 + self.sharpness)


def attend(
    query: Float[Tensor, "rows query_heads new dim"],
    key: Float[Tensor, "rows kv_heads tokens dim"],
    value: Float[Tensor, "rows kv_heads tokens dim"],
    visible: Bool[Tensor, "rows kv_heads new tokens"],
    scaling: float,
) -> Exact:
    """softmax(scaling * q k + mask) v, query head h reading KV head h // group."""
    rows, query_heads, new, dim = query.shape
    heads = key.shape[1]
    grouped = query.double().reshape(rows, heads, query_heads // heads, new, dim)
    logits = torch.einsum("bhgnd,bhtd->bhgnt", grouped, key.double()) * scaling
    logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
    weights = logits.softmax(dim=-1)
    output = torch.einsum("bhgnt,bhtd->bhgnd", weights, value.double())
    size = torch.einsum("bhgnt,bht->bhgn", weights, value.double().square().sum(-1)).sqrt()
    sharpness = logits.masked_fill(~visible[:, :, None], 0).abs().amax(-1)

    def by_position(x: Tensor) -> Tensor:
        return x.reshape(rows, query_heads, new, *x.shape[4:]).transpose(1, 2)

    return Exact(by_position(output), by_position(size), by_position(sharpness))
