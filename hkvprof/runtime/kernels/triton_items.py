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
    HOST_BITS,
    HOT_BITS,
    HOT_SCORE,
    HOT_START,
    ITEMS,
    MEAN,
    PICKED,
    ROWS,
    SLOTS,
    address,
    dot,
    field,
    idle,
    narrow,
    row_address,
    small,
)
from hkvprof.runtime.kernels.triton_rows import decoded, encode, key_logits
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
def gather_rows_kernel(
    heads: tl.tensor,
    which: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    due: tl.tensor,
    missing: tl.tensor,
    free: tl.tensor,
    counts: tl.tensor,
    CHUNK: tl.constexpr,
    FROM_ROWS: tl.constexpr,
    TO_ROWS: tl.constexpr,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """gather_kernel, BLOCK tokens a program, where host items, hot slots or both are rows of bytes:
    these are copied, or decoded into the storage, or encoded from what the host holds."""
    head = tl.load(which + tl.program_id(0))
    if idle(heads, head):
        return
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + head) * CHUNK
    if tl.program_id(1) * BLOCK >= count:
        return
    inside = token < count
    base = field(heads, head, BASE)
    number, place = token // CHUNK, token % CHUNK
    item = tl.load(missing + base + number, mask=inside, other=0)
    slot = tl.load(free + base + number, mask=inside, other=0)
    source, target = item * CHUNK + place, slot * CHUNK + place
    half: tl.constexpr = DIM * BITS // 8 + (2 if BITS == 8 else 2 * (DIM // RUN))
    host_rows, rows = row_address(heads, head, HOST), row_address(heads, head, ROWS)
    d = tl.arange(0, WIDTH)
    real = inside[:, None] & (d < DIM)[None, :]
    if FROM_ROWS and TO_ROWS:
        words: tl.constexpr = half // 2  # of 4 bytes, in a whole row
        near, far = rows.to(tl.pointer_type(tl.int32)), host_rows.to(tl.pointer_type(tl.int32))
        for start in range(0, words, 64):
            word = start + tl.arange(0, 64)
            mask = inside[:, None] & (word < words)[None, :]
            read = tl.load(far + (source * words)[:, None] + word[None, :], mask=mask, other=0)
            tl.store(near + (target * words)[:, None] + word[None, :], read, mask=mask)
    elif FROM_ROWS:
        mean = address(heads, head, MEAN, key.dtype.element_ty)
        own = (field(heads, head, HOT_START) + target) * DIM
        where = own[:, None] + d[None, :]
        k = decoded(host_rows, mean, source, inside, BITS, RUN, DIM, WIDTH, BLOCK)
        tl.store(key + where, narrow(k, key.dtype.element_ty, UPCAST), mask=real)
        v = decoded(host_rows + half, mean + DIM, source, inside, BITS, RUN, DIM, WIDTH, BLOCK)
        tl.store(value + where, narrow(v, key.dtype.element_ty, UPCAST), mask=real)
    else:
        mean = address(heads, head, MEAN, key.dtype.element_ty)
        own = (item.to(tl.int64) * (2 * CHUNK) + place) * DIM
        where = address(heads, head, HOST, key.dtype.element_ty) + own[:, None] + d[None, :]
        k = tl.load(where, mask=real, other=0.0).to(tl.float32)
        v = tl.load(where + CHUNK * DIM, mask=real, other=0.0).to(tl.float32)
        encode(k, mean, rows, target, inside, BITS, RUN, DIM, WIDTH, BLOCK)
        encode(v, mean + DIM, rows + half, target, inside, BITS, RUN, DIM, WIDTH, BLOCK)
    first = inside & (place == 0)
    tl.store(address(heads, head, SLOTS, tl.int32) + slot, item, mask=first)
    if SMOOTH:
        score = tl.load(due + base + item, mask=first, other=0.0)
        tl.store(address(heads, head, HOT_SCORE, tl.float32) + slot, score, mask=first)


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
    HAS_8: tl.constexpr,
    HAS_4: tl.constexpr,
    RUN: tl.constexpr,
    FLOAT: tl.constexpr,
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
    valid = number < count
    q = queries(query, heads, head, group, DIM, GROUP, WIDTH)
    item = tl.load(picked + base + number, mask=valid, other=0).to(tl.int64)
    slot = tl.load(places + base + item, mask=valid, other=-1).to(tl.int64)
    host = address(heads, head, HOST, query.dtype.element_ty)
    own = key + field(heads, head, HOT_START) * DIM
    hot, cold = valid & (slot >= 0), valid & (slot < 0)
    if HAS_8 or HAS_4:
        mean = address(heads, head, MEAN, query.dtype.element_ty)
        total = key_logits(
            q, host, row_address(heads, head, HOST), mean, item, cold,
            small(heads, head, HOST_BITS), scale, 2 * DIM, HAS_8, HAS_4, RUN, GROUP, DIM, WIDTH,
            BLOCK, FLOAT, UPCAST,
        )  # fmt: skip
        near = key_logits(
            q, own, row_address(heads, head, ROWS), mean, slot, hot,
            small(heads, head, HOT_BITS), scale, DIM, HAS_8, HAS_4, RUN, GROUP, DIM, WIDTH,
            BLOCK, FLOAT, UPCAST,
        )  # fmt: skip
        total = tl.where(hot[None, :], near, total)
    else:
        d = tl.arange(0, WIDTH)
        inside = (d < DIM)[None, :]
        far = host + item[:, None] * (2 * DIM) + d[None, :]
        k = tl.load(far, mask=cold[:, None] & inside, other=0.0)
        near = tl.load(
            own + slot[:, None] * DIM + d[None, :], mask=hot[:, None] & inside, other=0.0
        )
        k = tl.where(hot[:, None], near, k)
        total = dot(q, tl.trans(k), UPCAST) * scale
    total = tl.where(tl.abs(total) < float("inf"), total, -float("inf"))
    put(total, logits, tops, sums, heads, head, block, number, count, group, GROUP)
