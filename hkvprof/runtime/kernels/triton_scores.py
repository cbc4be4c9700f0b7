"""Scores of dynamic heads' items in Triton, as the index estimates them.

Logits of a block of items and the block's log-sum-exp are written by one launch; the next turns
them into shares: softmax per query head, mean over the group. Which heads a launch works on is
listed in `which`; what it knows about a head is a row of `heads` (triton_common.FIELDS). Scratch
is flat: `logits` has [group, items] of a head from BASE * group on, `tops` and `sums` have [blocks,
group] from PARTS * group on. All logits are in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hkvprof.runtime.kernels.triton_common import (
    BASE,
    BLOCK_ITEMS,
    BOUNDS,
    CHANNELS,
    CODEBOOK,
    FIRST,
    HOT,
    ITEMS,
    PARTS,
    PICKED,
    PROJECTION,
    SECOND,
    SEGMENT,
    SLOTS,
    address,
    dot,
    field,
    idle,
    small,
)

CENTROIDS = tl.constexpr(256)
PART_TILE = tl.constexpr(64)


@triton.jit
def queries(
    query: tl.tensor,
    heads: tl.tensor,
    head: tl.tensor,
    group: tl.tensor,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """A head's queries [GROUP, WIDTH], zeros where padded."""
    g = tl.arange(0, GROUP)
    d = tl.arange(0, WIDTH)
    where = (small(heads, head, SEGMENT) * group + g[:, None]) * DIM + d[None, :]
    return tl.load(query + where, mask=(g[:, None] < group) & (d[None, :] < DIM), other=0.0)


@triton.jit
def put(
    values: tl.tensor,
    logits: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    heads: tl.tensor,
    head: tl.tensor,
    block: tl.tensor,
    item: tl.tensor,
    count: tl.tensor,
    group: tl.tensor,
    GROUP: tl.constexpr,
) -> None:
    """Write a block of logits [GROUP, items], and their maximum and sum."""
    g = tl.arange(0, GROUP)
    inside = (g[:, None] < group) & (item[None, :] < count)
    values = tl.where(item[None, :] < count, values, -float("inf"))
    start = field(heads, head, BASE) * group
    tl.store(logits + start + g[:, None] * count + item[None, :], values, mask=inside)
    top = tl.max(values, 1)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp2(values - base[:, None]), 1)
    part = (field(heads, head, PARTS) + block) * group + g
    tl.store(tops + part, top, mask=g < group)
    tl.store(sums + part, total, mask=g < group)


@triton.jit
def softmax_parts(
    tops: tl.tensor, sums: tl.tensor, parts: tl.tensor, stride: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The maximum and the sum of a softmax from those of its parts, which lie `stride` apart."""
    top = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for first in range(0, parts, TILE):
        part = first + tl.arange(0, TILE)
        some = tl.load(tops + part * stride, mask=part < parts, other=-float("inf"))
        higher = tl.maximum(top, tl.max(some, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(some - base)
        weight *= tl.load(sums + part * stride, mask=part < parts, other=0.0)
        total = total * tl.exp2(top - base) + tl.sum(weight, 0)
        top = higher
    return tl.where(top == -float("inf"), 0.0, top), total


@triton.jit
def mark_hot(heads: tl.tensor, head: tl.tensor, held: tl.tensor, BLOCK: tl.constexpr) -> None:
    """By one program: 1 for every item that is hot, 0 for all others."""
    base = field(heads, head, BASE)
    items = small(heads, head, ITEMS)
    for start in range(0, items, BLOCK):
        item = start + tl.arange(0, BLOCK)
        tl.store(held + base + item, tl.zeros([BLOCK], tl.int8), mask=item < items)
    tl.debug_barrier()  # other threads of this program mark what these cleared
    hot = small(heads, head, HOT)
    for start in range(0, hot, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        item = tl.load(address(heads, head, SLOTS, tl.int32) + slot, mask=slot < hot, other=0)
        tl.store(held + base + item, tl.full([BLOCK], 1, tl.int8), mask=slot < hot)


@triton.jit
def table_kernel(
    heads: tl.tensor,
    which: tl.tensor,
    query: tl.tensor,
    tables: tl.tensor,
    held: tl.tensor,
    group: tl.tensor,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
    MARK: tl.constexpr,
) -> None:
    """What every centroid of a code adds to a logit: `tables` [n, group, codes, 256].

    With MARK one program per head also marks what is hot in `held`.
    """
    n = tl.program_id(0)
    code = tl.program_id(1)
    head = tl.load(which + n)
    if idle(heads, head):
        return
    if MARK > 0 and code == 0:
        mark_hot(heads, head, held, MARK)
    q = queries(query, heads, head, group, DIM, GROUP, WIDTH).to(tl.float32)
    channels = small(heads, head, CHANNELS)
    bounds = address(heads, head, BOUNDS, tl.int64) + 2 * code
    projection = address(heads, head, PROJECTION, tl.float32)
    codebook = address(heads, head, CODEBOOK, tl.float32)
    g = tl.arange(0, GROUP)
    d = tl.arange(0, WIDTH)
    centroid = tl.arange(0, CENTROIDS)
    total = tl.zeros([GROUP, CENTROIDS], tl.float32)
    first = tl.load(bounds).to(tl.int32)
    end = tl.load(bounds + 1).to(tl.int32)
    for channel in range(first, end):
        column = tl.load(projection + d * channels + channel, mask=d < DIM, other=0.0)
        projected = tl.sum(q * column[None, :], 1)
        total += projected[:, None] * tl.load(codebook + centroid * channels + channel)[None, :]
    where = ((n * group + g[:, None]) * CODES + code) * CENTROIDS + centroid[None, :]
    tl.store(tables + where, total, mask=g[:, None] < group)


@triton.jit
def coded_kernel(
    heads: tl.tensor,
    which: tl.tensor,
    tables: tl.tensor,
    logits: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    scale: tl.tensor,
    group: tl.tensor,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Logits of a projected index; WORD is the integer type that holds an item's codes."""
    n = tl.program_id(0)
    block = tl.program_id(1)
    head = tl.load(which + n)
    if idle(heads, head):
        return
    items = small(heads, head, ITEMS)
    if block * BLOCK >= items:
        return
    item = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, GROUP)
    word = tl.load(address(heads, head, FIRST, WORD) + item, mask=item < items, other=0)
    inside = (g[:, None] < group) & (item[None, :] < items)
    total = tl.zeros([GROUP, BLOCK], tl.float32)
    for code in tl.static_range(CODES):
        centroid = ((word >> (8 * code)) & 255).to(tl.int32)
        row = ((n * group + g) * CODES + code) * CENTROIDS
        total += tl.load(tables + row[:, None] + centroid[None, :], mask=inside, other=0.0)
    put(total * scale, logits, tops, sums, heads, head, block, item, items, group, GROUP)


@triton.jit
def digest_kernel(
    heads: tl.tensor,
    which: tl.tensor,
    query: tl.tensor,
    logits: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    scale: tl.tensor,
    group: tl.tensor,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MINMAX: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Logits of mean keys, or upper bounds from smallest and largest keys."""
    block = tl.program_id(1)
    head = tl.load(which + tl.program_id(0))
    if idle(heads, head):
        return
    items = small(heads, head, ITEMS)
    if block * BLOCK >= items:
        return
    item = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    q = queries(query, heads, head, group, DIM, GROUP, WIDTH)
    where = item[:, None] * DIM + d[None, :]
    inside = (item[:, None] < items) & (d[None, :] < DIM)
    first = address(heads, head, FIRST, query.dtype.element_ty)
    if MINMAX:
        second = address(heads, head, SECOND, query.dtype.element_ty)
        exact = q.to(tl.float32)  # the interpreter compares bfloat16 as integers
        below = tl.where(exact > 0, 0.0, exact).to(q.dtype)  # NaN is not above 0, and stays
        above = tl.where(exact < 0, 0.0, exact).to(q.dtype)
        low = tl.load(first + where, mask=inside, other=0.0)
        high = tl.load(second + where, mask=inside, other=0.0)
        total = dot(below, tl.trans(low), UPCAST) + dot(above, tl.trans(high), UPCAST)
    else:
        total = dot(q, tl.trans(tl.load(first + where, mask=inside, other=0.0)), UPCAST)
    put(total * scale, logits, tops, sums, heads, head, block, item, items, group, GROUP)


@triton.jit
def share_kernel(
    heads: tl.tensor,
    which: tl.tensor,
    logits: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    picked: tl.tensor,
    scores: tl.tensor,
    group: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
    EXACT_ITEMS: tl.constexpr,
) -> None:
    """Scores of a block of items; with EXACT, of picked ones (EXACT_ITEMS in a partial sum)."""
    block = tl.program_id(1)
    head = tl.load(which + tl.program_id(0))
    if idle(heads, head):
        return
    if EXACT:
        count = small(heads, head, PICKED)
        parts = tl.cdiv(count, EXACT_ITEMS)
    else:
        count = small(heads, head, ITEMS)
        parts = tl.cdiv(count, small(heads, head, BLOCK_ITEMS))
    if block * BLOCK >= count:
        return
    g = tl.arange(0, GROUP)
    start = field(heads, head, PARTS) * group
    top = tl.full([GROUP], -float("inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    for first in range(0, parts, PART_TILE):
        part = first + tl.arange(0, PART_TILE)
        where = start + part[None, :] * group + g[:, None]
        inside = (g[:, None] < group) & (part[None, :] < parts)
        some = tl.load(tops + where, mask=inside, other=-float("inf"))
        higher = tl.maximum(top, tl.max(some, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(some - base[:, None]) * tl.load(sums + where, mask=inside, other=0.0)
        total = total * tl.exp2(top - base) + tl.sum(weight, 1)
        top = higher
    top = tl.where(top == -float("inf"), 0.0, top)
    item = block * BLOCK + tl.arange(0, BLOCK)
    own = field(heads, head, BASE)
    inside = (g[:, None] < group) & (item[None, :] < count)
    values = tl.load(
        logits + own * group + g[:, None] * count + item[None, :], mask=inside, other=-float("inf")
    )
    # Rows of padding have a sum of 0: they must not turn into NaN.
    total = tl.where(g < group, total, 1.0)
    share = tl.sum(tl.exp2(values - top[:, None]) / total[:, None], 0) / group
    if EXACT:
        item = tl.load(picked + own + item, mask=item < count, other=0)
        inside_one = block * BLOCK + tl.arange(0, BLOCK) < count
        tl.store(scores + own + item, share, mask=inside_one)
    else:
        tl.store(scores + own + item, share, mask=item < count)
