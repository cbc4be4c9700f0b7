"""Selection in Triton, on the device: the best items by radix select, and what must be fetched.

Items are compared by a 33-bit integer: the order of their `due` (float32), then whether they are
hot; of equals the lower number wins. One program per head finds the last wanted integer 7 bits at
a time, from histograms (Alabi et al., "Fast k-selection algorithms for graphics processing units",
2012), then lists what is missing and which slots are free. NaN counts as -1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hkvprof.runtime.kernels.triton_common import (
    BASE,
    FRESH,
    HOT,
    HOT_SCORE,
    ITEMS,
    PICKED,
    SLOTS,
    address,
    field,
    idle,
    small,
)

BITS = tl.constexpr(7)
DIGITS = tl.constexpr(5)
"""Together at least 33 bits."""
BINS = tl.constexpr(128)
ALL = tl.constexpr(2)
"""All items; else a part of them: 1 those that are hot, 0 the others."""


@triton.jit
def _settled(score: tl.tensor) -> tl.tensor:
    """NaN is -1, minus zero is zero."""
    score = tl.where(score == score, score, -1.0)
    return tl.where(score == 0, 0.0, score)


@triton.jit
def _rank(
    due: tl.tensor, held: tl.tensor, item: tl.tensor, inside: tl.tensor, HELD: tl.constexpr
) -> tl.tensor:
    """The integer that items are compared by; `held` is looked at with HELD only."""
    value = _settled(tl.load(due + item, mask=inside, other=0.0))
    bits = value.to(tl.int32, bitcast=True)
    rank = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648) * 2
    if HELD:
        rank += tl.load(held + item, mask=inside, other=0).to(tl.int64)
    return rank


@triton.jit
def _within(rank: tl.tensor, PART: tl.constexpr) -> tl.tensor:
    """Whether items of these ranks belong to a part."""
    return (rank & 1) == PART if PART != ALL else rank >= 0


@triton.jit
def _cut(
    due: tl.tensor,
    held: tl.tensor,
    items: tl.tensor,
    count: tl.tensor,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr = ALL,
) -> tuple[tl.tensor, tl.tensor]:
    """The rank of the `count`-th best item of a part, and how many of this very rank are wanted."""
    bins = tl.arange(0, BINS)
    last = tl.full([1], 0, tl.int64)
    room = tl.full([1], 0, tl.int32) + count
    for number in tl.static_range(DIGITS):
        shift = BITS * (DIGITS - 1 - number)
        histogram = tl.zeros([BINS], tl.int32)
        for start in range(0, items, BLOCK):
            item = start + tl.arange(0, BLOCK)
            rank = _rank(due, held, item, item < items, HELD)
            fits = (item < items) & ((rank >> (shift + BITS)) == last) & _within(rank, PART)
            digit = tl.where(fits, (rank >> shift) & (BINS - 1), 0).to(tl.int32)
            others = BLOCK - tl.sum(fits.to(tl.int32), 0)  # they are counted as 0
            histogram += tl.histogram(digit, BINS) - tl.where(bins == 0, others, 0)
        above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
        best = tl.sum((above + histogram >= room).to(tl.int32), 0) - 1
        room -= tl.sum(tl.where(bins == best, above, 0), 0)
        last = last * BINS + best
    return last, room


@triton.jit
def raise_kernel(
    heads: tl.tensor, which: tl.tensor, scores: tl.tensor, places: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Scores of hot items above all others, so that they are picked; and their slots."""
    head = tl.load(which + tl.program_id(0))
    if idle(heads, head):
        return
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < small(heads, head, HOT)
    item = tl.load(address(heads, head, SLOTS, tl.int32) + slot, mask=inside, other=0)
    best = tl.full([BLOCK], float("inf"), tl.float32)
    where = field(heads, head, BASE) + item
    tl.store(scores + where, best, mask=inside)
    tl.store(places + where, slot, mask=inside)


@triton.jit
def pick_kernel(
    heads: tl.tensor,
    which: tl.tensor,
    scores: tl.tensor,
    picked: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """List the PICKED items with the highest scores, in order."""
    head = tl.load(which + tl.program_id(0))
    if idle(heads, head):
        return
    base = field(heads, head, BASE)
    items = small(heads, head, ITEMS)
    own = scores + base
    last, room = _cut(own, own, items, small(heads, head, PICKED), False, BLOCK)
    equals = 0
    count = 0
    for start in range(0, items, BLOCK):
        item = start + tl.arange(0, BLOCK)
        rank = _rank(own, own, item, item < items, False)
        equal = ((item < items) & (rank == last)).to(tl.int32)
        order = equals + tl.cumsum(equal, 0)
        wanted = (item < items) & ((rank > last) | ((rank == last) & (order <= room)))
        place = count + tl.cumsum(wanted.to(tl.int32), 0) - 1
        tl.store(picked + base + place, item, mask=wanted)
        equals += tl.sum(equal, 0)
        count += tl.sum(wanted.to(tl.int32), 0)


@triton.jit
def due_kernel(
    heads: tl.tensor,
    scores: tl.tensor,
    due: tl.tensor,
    held: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """`due` starts as the score (NaN: -1); no item is held yet."""
    head = tl.program_id(0)
    if idle(heads, head):
        return
    items = small(heads, head, ITEMS)
    base = field(heads, head, BASE)
    item = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + base + item, mask=item < items, other=0.0)
    tl.store(due + base + item, _settled(score), mask=item < items)
    tl.store(held + base + item, tl.zeros([BLOCK], tl.int8), mask=item < items)


@triton.jit
def hold_kernel(
    heads: tl.tensor,
    due: tl.tensor,
    held: tl.tensor,
    smoothing: tl.tensor,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
) -> None:
    """Mark items that are hot; their `due` is at least `smoothing` times their hot score."""
    head = tl.program_id(0)
    if idle(heads, head):
        return
    base = field(heads, head, BASE)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < small(heads, head, HOT)
    item = tl.load(address(heads, head, SLOTS, tl.int32) + slot, mask=inside, other=0)
    tl.store(held + base + item, tl.full([BLOCK], 1, tl.int8), mask=inside)
    if SMOOTH:
        kept = tl.load(address(heads, head, HOT_SCORE, tl.float32) + slot, mask=inside, other=0.0)
        plain = tl.load(due + base + item, mask=inside, other=0.0)
        tl.store(due + base + item, tl.maximum(plain, smoothing * kept), mask=inside)


@triton.jit
def _list(
    due: tl.tensor,
    held: tl.tensor,
    missing: tl.tensor,
    items: tl.tensor,
    last: tl.tensor,
    room: tl.tensor,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """List items of a part above a cut that are not hot; how many, and of those with the last rank
    the last one that is wanted."""
    limit = tl.full([1], -1, tl.int32)
    equals = 0
    count = 0
    for start in range(0, items, BLOCK):
        item = start + tl.arange(0, BLOCK)
        rank = _rank(due, held, item, item < items, True)
        inside = (item < items) & _within(rank, PART)
        equal = (inside & (rank == last)).to(tl.int32)
        order = equals + tl.cumsum(equal, 0)
        taken = (equal > 0) & (order <= room)
        limit = tl.maximum(limit, tl.max(tl.where(taken, item, -1), 0))
        absent = inside & ((rank & 1) == 0) & ((rank > last) | taken)
        place = count + tl.cumsum(absent.to(tl.int32), 0) - 1
        tl.store(missing + place, item, mask=absent)
        equals += tl.sum(equal, 0)
        count += tl.sum(absent.to(tl.int32), 0)
    return limit, count


@triton.jit
def select_kernel(
    heads: tl.tensor,
    due: tl.tensor,
    held: tl.tensor,
    missing: tl.tensor,
    free: tl.tensor,
    counts: tl.tensor,
    fetched: tl.tensor,
    most: tl.tensor,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
) -> None:
    """List wanted items that are not hot and slots whose item is not wanted; count them.

    At most FRESH of them: the best of those that are not hot, and the last of the hot ones. Slots
    that keep their item take over its `due` as hot score.
    """
    head = tl.program_id(0)
    if idle(heads, head):
        return
    base = field(heads, head, BASE)
    items = small(heads, head, ITEMS)
    hot = small(heads, head, HOT)
    last, room = _cut(due + base, held + base, items, hot, True, BLOCK)
    limit, count = _list(due + base, held + base, missing + base, items, last, room, BLOCK, ALL)
    fresh = small(heads, head, FRESH)
    if count > fresh:
        last, room = _cut(due + base, held + base, items, fresh, True, BLOCK, 0)
        _list(due + base, held + base, missing + base, items, last, room, BLOCK, 0)
        last, room = _cut(due + base, held + base, items, hot - fresh, True, BLOCK, 1)
        limit, _ = _list(due + base, held + base, missing + base, items, last, room, BLOCK, 1)
        count = fresh
    slots = address(heads, head, SLOTS, tl.int32)
    empty = 0
    for start in range(0, hot, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        item = tl.load(slots + slot, mask=slot < hot, other=0)
        rank = _rank(due + base, held + base, item, slot < hot, True)
        kept = (rank > last) | ((rank == last) & (item <= limit))
        left = (slot < hot) & (kept == 0)
        place = empty + tl.cumsum(left.to(tl.int32), 0) - 1
        tl.store(free + base + place, slot, mask=left)
        empty += tl.sum(left.to(tl.int32), 0)
        if SMOOTH:
            score = tl.load(due + base + item, mask=slot < hot, other=0.0)
            to = address(heads, head, HOT_SCORE, tl.float32) + slot
            tl.store(to, score, mask=(slot < hot) & kept)
    tl.store(counts + head, count)
    tl.store(fetched + head, tl.load(fetched + head) + count)
    tl.store(most + head, tl.maximum(tl.load(most + head), count.to(tl.int64)))
