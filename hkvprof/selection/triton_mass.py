"""Text-centric sparsity on CUDA: the mass of each row's largest attention weights, in Triton.

Nothing of size rows x tokens is kept. A first pass over the keys finds every row's maximum and sum,
a second one sorts the weights into bins by their distance from the maximum, in octaves. What lies
above the bin of the k-th largest weight counts whole, of that bin the mean weight times what is
missing. The weights of a bin differ by at most 0.8%, so that a row's mass is wrong by at most a
quarter of that, and only by as much as the one bin weighs. Importing this imports triton.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BINS = 2048
OCTAVES = 24
"""Weights below 2^-24 of a row's largest share the last bin."""
LOG2_E = 1.4426950408889634
ROWS = 16
"""Rows per program: the least that tl.dot takes."""
SPAN = 2048
"""Keys per program."""
TILE_BYTES = 16384


@triton.jit
def _logits(
    query: tl.tensor,
    key: tl.tensor,
    rows: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    scale: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """Logits [ROWS, BLOCK] in units of log 2; minus infinity for what a row does not see."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    own = (head * count + row[:, None]) * DIM + d[None, :]
    q = tl.load(query + own, mask=(row[:, None] < count) & (d[None, :] < DIM), other=0.0)
    where = token[:, None].to(tl.int64) * DIM + d[None, :]
    k = tl.load(key + where, mask=(token[:, None] < tokens) & (d[None, :] < DIM), other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
    values = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    last = tl.load(rows + row, mask=row < count, other=-1)
    return tl.where(token[None, :] <= last[:, None], values, -float("inf"))


@triton.jit
def peak_kernel(
    query: tl.tensor,
    key: tl.tensor,
    rows: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    scale: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Maximum and sum of a span of keys: `tops` and `sums` [heads, rows, spans]."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(2) * SPAN
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(first, tl.minimum(first + SPAN, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        values = _logits(query, key, rows, row, token, scale, count, tokens, DIM, WIDTH, UPCAST)
        higher = tl.maximum(top, tl.max(values, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(values - base[:, None]), 1)
        top = higher
    where = (tl.program_id(0) * count + row) * tl.num_programs(2) + tl.program_id(2)
    tl.store(tops + where, top, mask=row < count)
    tl.store(sums + where, total, mask=row < count)


@triton.jit
def mass_kernel(
    query: tl.tensor,
    key: tl.tensor,
    rows: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    numbers: tl.tensor,
    masses: tl.tensor,
    scale: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    OCTAVES: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Add a span's weights to their bins: `numbers` and `masses` [heads, rows, BINS]."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    own = tl.program_id(0) * count + row
    spans = tl.num_programs(2)
    part = tl.arange(0, SPANS)
    where = own[:, None] * spans + part[None, :]
    inside = (row[:, None] < count) & (part[None, :] < spans)
    some = tl.load(tops + where, mask=inside, other=-float("inf"))
    top = tl.max(some, 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2(some - top[:, None]) * tl.load(sums + where, mask=inside, other=0.0)
    total = tl.sum(weight, 1)
    first = tl.program_id(2) * SPAN
    last = tl.load(rows + row, mask=row < count, other=-1)
    for start in range(first, tl.minimum(first + SPAN, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        values = _logits(query, key, rows, row, token, scale, count, tokens, DIM, WIDTH, UPCAST)
        far = (top[:, None] - values) * (BINS / OCTAVES)
        far = tl.where(far < BINS - 1, far, BINS - 1)  # and where it is no number
        bin = own[:, None].to(tl.int64) * BINS + far.to(tl.int32)
        seen = (row[:, None] < count) & (token[None, :] <= last[:, None])
        tl.atomic_add(numbers + bin, tl.full([ROWS, BLOCK], 1.0, tl.float32), mask=seen)
        tl.atomic_add(masses + bin, tl.exp2(values - top[:, None]) / total[:, None], mask=seen)


INTERPRETED = not isinstance(mass_kernel, triton.runtime.JITFunction)


def top_mass(
    query: Float[Tensor, "query_heads rows dim"],
    key: Float[Tensor, "kv_heads tokens dim"],
    rows: Int[Tensor, " rows"],
    scaling: float,
    counts: Int[Tensor, "kappas rows"],
) -> Float[Tensor, "kappas query_heads"]:
    """Mean over rows of the mass of the counts[., row] largest weights; row r sees rows[r] + 1.

    Takes 16 KiB per row and query head of one KV head, whatever the number of tokens.
    """
    group = len(query) // len(key)
    blocks = query.to(key.dtype).contiguous().split(group)
    pairs = zip(blocks, key.contiguous(), strict=True)
    return torch.cat([_of_head(q, k, rows.long(), scaling, counts) for q, k in pairs], dim=-1)


def _of_head(
    query: Float[Tensor, "group rows dim"],
    key: Float[Tensor, "tokens dim"],
    rows: Int[Tensor, " rows"],
    scaling: float,
    counts: Int[Tensor, "kappas rows"],
) -> Float[Tensor, "kappas group"]:
    """Mass of the largest weights for the query heads of one KV head."""
    group, count, dim = query.shape
    spans = -(-len(key) // SPAN)
    width = max(16, 1 << (dim - 1).bit_length())
    tops, sums = torch.empty((2, group, count, spans), dtype=torch.float32, device=key.device)
    numbers, masses = torch.zeros((2, group, count, BINS), dtype=torch.float32, device=key.device)
    sizes = {
        "DIM": dim,
        "WIDTH": width,
        "ROWS": ROWS,
        "SPAN": SPAN,
        "BLOCK": min(128, max(16, TILE_BYTES // (width * key.element_size()))),
        "UPCAST": INTERPRETED,
    }
    grid = (group, -(-count // ROWS), spans)
    last = (scaling * LOG2_E, count, len(key))
    with torch.cuda.device(key.device) if key.device.type == "cuda" else nullcontext():
        peak_kernel[grid](query, key, rows, tops, sums, *last, **sizes)
        mass_kernel[grid](
            query, key, rows, tops, sums, numbers, masses, *last,
            SPANS=1 << (spans - 1).bit_length(), BINS=BINS, OCTAVES=OCTAVES, **sizes,
        )  # fmt: skip
    upto, mass = numbers.cumsum(-1), masses.cumsum(-1)
    picked = []
    for wanted in counts:
        at = (upto < wanted[None, :, None]).sum(-1, keepdim=True).clamp(max=BINS - 1)
        here, weight = numbers.gather(-1, at), masses.gather(-1, at)
        missing = wanted[None, :, None] - (upto.gather(-1, at) - here)
        picked.append(mass.gather(-1, at) - weight + missing * weight / here)
    return torch.stack(picked)[..., 0].mean(dim=-1)
