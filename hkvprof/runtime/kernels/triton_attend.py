"""Split-KV decode attention in Triton over flat ragged storage (flash decoding).

One program per (segment, split) keeps a running maximum and sum over its blocks of keys (Milakov
and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135); a second kernel merges the splits
by their log-sum-exp. Lengths are read on the device, and the grid depends on capacities alone, so
that a launch stays valid while segments grow within their capacity: a CUDA graph may replay it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.runtime.kernels.triton_common import INTERPRETED, blocks, dot, narrow, padded

PROGRAMS = 512
"""Programs that a launch aims at: a few per multiprocessor. Untuned."""
MAX_SPLITS = 64
TILE_BYTES = 16384
"""Of one tile of keys, to fit two of keys and two of values in 96 KiB of shared memory."""
LOG2_E = 1.4426950408889634


@triton.jit
def _share(length: tl.tensor, splits: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Tokens per split: whole blocks, so that all splits but the last are full."""
    return tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK


@triton.jit
def _split_kernel(
    key: tl.tensor,
    value: tl.tensor,
    query: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    part_out: tl.tensor,
    part_top: tl.tensor,
    part_sum: tl.tensor,
    scale: tl.tensor,
    group: tl.tensor,
    splits: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Attention of one segment's query heads over one split; `scale` has log2(e) folded in."""
    segment = tl.program_id(0)
    split = tl.program_id(1)
    first = tl.load(starts + segment).to(tl.int64)
    length = tl.load(ends + segment) - first.to(tl.int32)
    share = _share(length, splits, BLOCK)
    begin = split * share
    if begin >= length:
        return
    end = tl.minimum(begin + share, length)
    heads = tl.arange(0, GROUP)
    channels = tl.arange(0, WIDTH)
    rows = tl.arange(0, BLOCK)
    real = (heads[:, None] < group) & (channels[None, :] < DIM)
    own = (segment * group + heads[:, None]) * DIM + channels[None, :]
    q = tl.load(query + own, mask=real, other=0.0)
    top = tl.full([GROUP], -float("inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    out = tl.zeros([GROUP, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + rows
        here = token < end
        where = (first + token)[:, None] * DIM + channels[None, :]
        inside = here[:, None] & (channels[None, :] < DIM)
        k = tl.load(key + where, mask=inside, other=0.0)
        logits = dot(q, tl.trans(k), UPCAST) * scale
        logits = tl.where(here[None, :], logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(logits - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weight, 1)
        v = tl.load(value + where, mask=inside, other=0.0)
        if UPCAST:
            out = out * fade[:, None] + dot(weight, v, UPCAST)
        else:
            out = out * fade[:, None] + dot(weight.to(v.dtype), v, UPCAST)
        top = higher
    part = (segment * splits + split) * group + heads
    tl.store(part_top + part, top, mask=heads < group)
    tl.store(part_sum + part, total, mask=heads < group)
    tl.store(part_out + part[:, None] * DIM + channels[None, :], out, mask=real)


@triton.jit
def _merge_kernel(
    part_out: tl.tensor,
    part_top: tl.tensor,
    part_sum: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    result: tl.tensor,
    group: tl.tensor,
    splits: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One query head's output from its splits; zeros where the segment is empty."""
    segment = tl.program_id(0)
    head = tl.program_id(1)
    channels = tl.arange(0, WIDTH)
    inside = channels < DIM
    length = tl.load(ends + segment) - tl.load(starts + segment)
    share = _share(length, splits, BLOCK)
    used = 0
    if length > 0:
        used = tl.cdiv(length, share)
    number = tl.arange(0, SPLITS)
    parts = (segment * splits + number) * group + head
    top = tl.load(part_top + parts, mask=number < used, other=-float("inf"))
    top = tl.max(top, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    out = tl.zeros([WIDTH], tl.float32)
    total = 0.0
    for split in range(used):
        part = (segment * splits + split) * group + head
        weight = tl.exp2(tl.load(part_top + part) - base)
        total += weight * tl.load(part_sum + part)
        out += weight * tl.load(part_out + part * DIM + channels, mask=inside, other=0.0)
    if used > 0:
        out = out / total
    where = (segment * group + head) * DIM + channels
    tl.store(result + where, narrow(out, result.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def append_kernel(
    key: tl.tensor,
    value: tl.tensor,
    ends: tl.tensor,
    new_key: tl.tensor,
    new_value: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One token to the end of a segment, which goes on by one."""
    segment = tl.program_id(0)
    channels = tl.arange(0, WIDTH)
    inside = channels < DIM
    end = tl.load(ends + segment)
    to = end.to(tl.int64) * DIM + channels
    own = segment * DIM + channels
    tl.store(key + to, tl.load(new_key + own, mask=inside, other=0.0), mask=inside)
    tl.store(value + to, tl.load(new_value + own, mask=inside, other=0.0), mask=inside)
    tl.debug_barrier()  # all threads have read the end
    tl.store(ends + segment, end + 1)


def append(
    key: Float[Tensor, "capacity dim"],
    value: Float[Tensor, "capacity dim"],
    ends: Int[Tensor, " segments"],
    new_key: Float[Tensor, "segments 1 dim"],
    new_value: Float[Tensor, "segments 1 dim"],
) -> None:
    """Write one token behind the end of every segment, and advance the ends."""
    dim = key.shape[1]
    append_kernel[(len(ends),)](
        key, value, ends, new_key.contiguous(), new_value.contiguous(),
        DIM=dim, WIDTH=padded(dim), num_warps=1,
    )  # fmt: skip


def attend(
    key: Float[Tensor, "capacity dim"],
    value: Float[Tensor, "capacity dim"],
    starts: Int[Tensor, " segments"],
    ends: Int[Tensor, " segments"],
    longest: int,
    query: Float[Tensor, "segments group dim"],
    scaling: float,
    programs: int = PROGRAMS,
) -> Float[Tensor, "segments group dim"]:
    """Attention of one new token per row; segment s is rows starts[s] to ends[s] (int32).

    No segment may be longer than `longest`, which sets the grid together with `programs`.
    """
    segments, group, dim = query.shape
    width = padded(dim)
    block = min(128, max(16, TILE_BYTES // (width * key.element_size())))
    splits = min(MAX_SPLITS, blocks(longest, block), blocks(programs, segments))
    count = segments * splits * group
    scratch = torch.empty(count * (dim + 2), dtype=torch.float32, device=key.device)
    part_out, part_top, part_sum = scratch.split([count * dim, count, count])
    out = torch.empty_like(query)
    _split_kernel[(segments, splits)](
        key,
        value,
        query,
        starts,
        ends,
        part_out,
        part_top,
        part_sum,
        scaling * LOG2_E,
        group,
        splits,
        GROUP=padded(group),
        DIM=dim,
        WIDTH=width,
        BLOCK=block,
        UPCAST=INTERPRETED,
        num_warps=4,
        num_stages=2,
    )
    _merge_kernel[(segments, group)](
        part_out,
        part_top,
        part_sum,
        starts,
        ends,
        out,
        group,
        splits,
        DIM=dim,
        WIDTH=width,
        BLOCK=block,
        SPLITS=padded(splits, 1),
        UPCAST=INTERPRETED,
        num_warps=2,
    )
    return out
