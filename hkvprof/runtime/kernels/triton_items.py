"""Fetching items into hot slots in Triton, straight from pinned host memory.

A device reads pinned memory at the address that the host knows it by (unified addressing). Only
items that were selected and are not hot are read; K and V of an item are neighbours on the host,
so that one item is one contiguous read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hkvprof.runtime.kernels.triton_common import (
    BASE,
    HOST,
    HOT_SCORE,
    HOT_START,
    ITEMS,
    PICKED,
    SLOTS,
    address,
    dot,
    field,
    idle,
    small,
)
from hkvprof.runtime.kernels.triton_scores import put, queries


@triton.jit
def gather_kernel(
    heads: tl.tensor,
    which: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    due: tl.tensor,
    missing: tl.tensor,
    free: tl.tensor,
    counts: tl.tensor,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
) -> None:
    """Copy missing[i] to slot free[i], ROWS items a program, and say so in the slot map."""
    head = tl.load(which + tl.program_id(0))
    if idle(heads, head):
        return
    number = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    count = tl.load(counts + head)
    if tl.program_id(1) * ROWS >= count:
        return
    inside = number < count
    base = field(heads, head, BASE)
    item = tl.load(missing + base + number, mask=inside, other=0)
    slot = tl.load(free + base + number, mask=inside, other=0)
    half: tl.constexpr = CHUNK * DIM
    source = item.to(tl.int64) * (2 * half)
    target = (field(heads, head, HOT_START) + slot.to(tl.int64) * CHUNK) * DIM
    for start in range(0, 2 * half, BLOCK):
        element = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (element[None, :] < 2 * half)
        where = source[:, None] + element[None, :]
        host = address(heads, head, HOST, key.dtype.element_ty)
        rows = tl.load(host + where, mask=mask, other=0.0)
        to = target[:, None] + (element % half)[None, :]
        tl.store(key + to, rows, mask=mask & (element < half)[None, :])
        tl.store(value + to, rows, mask=mask & (element >= half)[None, :])
    tl.store(address(heads, head, SLOTS, tl.int32) + slot, item, mask=inside)
    if SMOOTH:
        score = tl.load(due + base + item, mask=inside, other=0.0)
        tl.store(address(heads, head, HOT_SCORE, tl.float32) + slot, score, mask=inside)


@triton.jit
def exact_kernel(
    heads: tl.tensor,
    which: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    picked: tl.tensor,
    places: tl.tensor,
    scores: tl.tensor,
    logits: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    scale: tl.tensor,
    group: tl.tensor,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RESET: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Logits of the picked items by their keys, in their slots where they are hot, others in host
    memory; and -1 for all scores, for now.

    A logit that is not finite counts as minus infinity.
    """
    block = tl.program_id(1)
    head = tl.load(which + tl.program_id(0))
    if idle(heads, head):
        return
    items = small(heads, head, ITEMS)
    base = field(heads, head, BASE)
    own = block * RESET + tl.arange(0, RESET)
    tl.store(scores + base + own, tl.full([RESET], -1.0, tl.float32), mask=own < items)
    count = small(heads, head, PICKED)
    if block * BLOCK >= count:
        return
    number = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    q = queries(query, heads, head, group, DIM, GROUP, WIDTH)
    item = tl.load(picked + base + number, mask=number < count, other=0).to(tl.int64)
    where = item[:, None] * (2 * DIM) + d[None, :]
    inside = (number[:, None] < count) & (d[None, :] < DIM)
    slot = tl.load(places + base + item, mask=number < count, other=-1)
    row = (field(heads, head, HOT_START) + slot.to(tl.int64)) * DIM
    hot = inside & (slot >= 0)[:, None]
    cold = inside & (slot < 0)[:, None]
    host = address(heads, head, HOST, query.dtype.element_ty)
    k = tl.load(host + where, mask=cold, other=0.0)
    k = tl.where(hot, tl.load(key + row[:, None] + d[None, :], mask=hot, other=0.0), k)
    total = dot(q, tl.trans(k), UPCAST) * scale
    total = tl.where(tl.abs(total) < float("inf"), total, -float("inf"))
    put(total, logits, tops, sums, heads, head, block, number, count, group, GROUP)
