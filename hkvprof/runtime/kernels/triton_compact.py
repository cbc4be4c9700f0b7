"""Selection among candidates in Triton: of heads that rerank, hot items and a few others.

What decides is kept in registers. Candidates are compared by integers that no two of them share:
the order of their score (float32), then whether they are hot, then the lower number. The last
wanted integer is found bit by bit. Only items with an exact score can be wanted, since as many as
are hot have one, and at equal scores hot ones win: all others need not be looked at.

Candidate c of a head is what slot c holds where c < HOT, else number c - HOT of the others, `cold`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hkvprof.runtime.kernels.triton_common import (
    BASE,
    BLOCK_ITEMS,
    FRESH,
    HOST,
    HOST_BITS,
    HOT,
    HOT_BITS,
    HOT_SCORE,
    HOT_START,
    ITEMS,
    MEAN,
    PARTS,
    PICKED,
    ROWS,
    SLOTS,
    address,
    field,
    idle,
    row_address,
    small,
)
from hkvprof.runtime.kernels.triton_rows import key_logits
from hkvprof.runtime.kernels.triton_scores import put, queries, softmax_parts

NUMBERS = tl.constexpr(2**28)
"""More than there are items."""
BITS = tl.constexpr(61)
"""Of an integer that stands for an item."""


@triton.jit
def order(score: tl.tensor, hot: tl.tensor, item: tl.tensor) -> tl.tensor:
    """The integers that items are compared by; NaN counts as -1."""
    score = tl.where(score == score, score, -1.0)
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    return (rank * 2 + hot + 1) * NUMBERS - 1 - item.to(tl.int64)


@triton.jit
def item_of(key: tl.tensor) -> tl.tensor:
    """The item that such an integer stands for."""
    return ((key // NUMBERS + 1) * NUMBERS - 1 - key).to(tl.int32)


@triton.jit
def least_of_best(key: tl.tensor, count: tl.tensor) -> tl.tensor:
    """The `count`-th largest of integers, of which those below 0 do not count; 0 for fewer."""
    last = tl.zeros([1], tl.int64)
    bit = tl.full([1], 2**60, tl.int64)
    for _ in range(BITS):
        enough = tl.sum((key >= last + bit).to(tl.int32), 0) >= count
        last = tl.where(enough, last + bit, last)
        bit = bit >> 1
    return last


@triton.jit
def best_kernel(
    heads: tl.tensor,
    logits: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    held: tl.tensor,
    best: tl.tensor,
    group: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
    PART_TILE: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    """The ROOM best items of a block that are not hot, in order: `best` [heads, blocks, ROOM]."""
    head = tl.program_id(0)
    block = tl.program_id(1)
    if idle(heads, head):
        return
    items = small(heads, head, ITEMS)
    item = block * BLOCK + tl.arange(0, BLOCK)
    base = field(heads, head, BASE)
    parts = tl.cdiv(items, small(heads, head, BLOCK_ITEMS))
    score = tl.zeros([BLOCK], tl.float32)
    first = field(heads, head, PARTS) * group
    for g in range(group):
        top, total = softmax_parts(tops + first + g, sums + first + g, parts, group, PART_TILE)
        where = base * group + g * items + item
        value = tl.load(logits + where, mask=item < items, other=-float("inf"))
        score += tl.exp2(value - top) / total
    hot = tl.load(held + base + item, mask=item < items, other=1)
    key = tl.where(hot == 0, order(score / group, 0, item), -1)
    wanted = key >= least_of_best(key, ROOM)
    place = tl.cumsum(wanted.to(tl.int32), 0) - 1
    room = best + (head * blocks + block).to(tl.int64) * ROOM
    tl.store(room + place, key, mask=wanted)
    rest = tl.sum(wanted.to(tl.int32), 0) + tl.arange(0, BLOCK)
    tl.store(room + rest, tl.full([BLOCK], -1, tl.int64), mask=rest < ROOM)


@triton.jit
def list_cold(
    heads: tl.tensor,
    head: tl.tensor,
    best: tl.tensor,
    cold: tl.tensor,
    blocks: tl.tensor,
    ROOM: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    """The best of all blocks' best, in order of their numbers.

    Several programs may do this for one head: they write the same.
    """
    number = tl.arange(0, ENTRIES)
    count = small(heads, head, PICKED) - small(heads, head, HOT)
    own = best + head.to(tl.int64) * blocks * ROOM
    key = tl.load(own + number, mask=number < blocks * ROOM, other=-1)
    wanted = (key >= 0) & (key >= least_of_best(key, count))
    place = tl.cumsum(wanted.to(tl.int32), 0) - 1
    tl.store(cold + head * ROOM + place, item_of(key), mask=wanted)
    tl.debug_barrier()


@triton.jit
def candidate_kernel(
    heads: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    best: tl.tensor,
    cold: tl.tensor,
    logits: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    scale: tl.tensor,
    group: tl.tensor,
    blocks: tl.tensor,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    ENTRIES: tl.constexpr,
    HAS_8: tl.constexpr,
    HAS_4: tl.constexpr,
    RUN: tl.constexpr,
    FLOAT: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Logits of candidates by their keys: first blocks of others, from the host, then of slots.

    A logit that is not finite counts as minus infinity.
    """
    head = tl.program_id(0)
    block = tl.program_id(1)
    if idle(heads, head):
        return
    hot = small(heads, head, HOT)
    count = small(heads, head, PICKED)
    far = tl.cdiv(count - hot, BLOCK)
    if block >= far + tl.cdiv(hot, BLOCK):
        return
    q = queries(query, heads, head, group, DIM, GROUP, WIDTH)
    mean = address(heads, head, MEAN, query.dtype.element_ty)
    if block < far:
        list_cold(heads, head, best, cold, blocks, ROOM, ENTRIES)
        number = block * BLOCK + tl.arange(0, BLOCK)
        valid = number < count - hot
        candidate = hot + number
        item = tl.load(cold + head * ROOM + number, mask=valid, other=0).to(tl.int64)
        host = address(heads, head, HOST, query.dtype.element_ty)
        total = key_logits(
            q, host, row_address(heads, head, HOST), mean, item, valid,
            small(heads, head, HOST_BITS), scale, 2 * DIM, HAS_8, HAS_4, RUN, GROUP, DIM, WIDTH,
            BLOCK, FLOAT, UPCAST,
        )  # fmt: skip
    else:
        candidate = (block - far) * BLOCK + tl.arange(0, BLOCK)
        valid = candidate < hot
        total = key_logits(
            q, key + field(heads, head, HOT_START) * DIM, row_address(heads, head, ROWS), mean,
            candidate, valid, small(heads, head, HOT_BITS), scale, DIM, HAS_8, HAS_4, RUN, GROUP,
            DIM, WIDTH, BLOCK, FLOAT, UPCAST,
        )  # fmt: skip
    total = tl.where(tl.abs(total) < float("inf"), total, -float("inf"))
    candidate = tl.where(valid, candidate, count)
    put(total, logits, tops, sums, heads, head, block, candidate, count, group, GROUP)


@triton.jit
def _wanted(key: tl.tensor, candidate: tl.tensor, hot: tl.tensor, fresh: tl.tensor) -> tl.tensor:
    """Which candidates the slots hold next; at most `fresh` of them are not hot yet."""
    wanted = (key >= 0) & (key >= least_of_best(key, hot))
    if tl.sum((wanted & (candidate >= hot)).to(tl.int32), 0) > fresh:
        others = tl.where(candidate >= hot, key, -1)
        own = tl.where(candidate < hot, key, -1)
        coming = (others >= 0) & (others >= least_of_best(others, fresh))
        staying = (own >= 0) & (own >= least_of_best(own, hot - fresh))
        wanted = coming | staying
    return wanted


@triton.jit
def choose_kernel(
    heads: tl.tensor,
    logits: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    cold: tl.tensor,
    due: tl.tensor,
    missing: tl.tensor,
    free: tl.tensor,
    counts: tl.tensor,
    fetched: tl.tensor,
    reads: tl.tensor,
    most: tl.tensor,
    group: tl.tensor,
    smoothing: tl.tensor,
    BLOCK: tl.constexpr,
    PART_TILE: tl.constexpr,
    EXACT_ITEMS: tl.constexpr,
    ROOM: tl.constexpr,
    SMOOTH: tl.constexpr,
) -> None:
    """triton_select.select_kernel among candidates: what comes, which slots it goes to, counts."""
    head = tl.program_id(0)
    if idle(heads, head):
        return
    base = field(heads, head, BASE)
    hot = small(heads, head, HOT)
    count = small(heads, head, PICKED)
    parts = tl.cdiv(hot, EXACT_ITEMS) + tl.cdiv(count - hot, EXACT_ITEMS)
    candidate = tl.arange(0, BLOCK)
    slots = address(heads, head, SLOTS, tl.int32)
    is_hot = candidate < hot
    is_cold = (candidate >= hot) & (candidate < count)
    item = tl.load(slots + candidate, mask=is_hot, other=0)
    item += tl.load(cold + head * ROOM + candidate - hot, mask=is_cold, other=0)
    score = tl.zeros([BLOCK], tl.float32)
    first = field(heads, head, PARTS) * group
    for g in range(group):
        top, total = softmax_parts(tops + first + g, sums + first + g, parts, group, PART_TILE)
        where = base * group + g * count + candidate
        value = tl.load(logits + where, mask=candidate < count, other=-float("inf"))
        score += tl.exp2(value - top) / total
    score = score / group
    score = tl.where(score == score, score, -1.0)
    if SMOOTH:
        kept = address(heads, head, HOT_SCORE, tl.float32)
        before = tl.load(kept + candidate, mask=is_hot, other=0.0)
        score = tl.where(is_hot, tl.maximum(score, smoothing * before), score)
    key = tl.where(candidate < count, order(score, is_hot.to(tl.int64), item), -1)
    wanted = _wanted(key, candidate, hot, small(heads, head, FRESH))
    comes = wanted & is_cold
    place = tl.cumsum(comes.to(tl.int32), 0) - 1
    tl.store(missing + base + place, item, mask=comes)
    goes = is_hot & (wanted == 0)
    place = tl.cumsum(goes.to(tl.int32), 0) - 1
    tl.store(free + base + place, candidate, mask=goes)
    if SMOOTH:
        tl.store(due + base + item, score, mask=comes)
        tl.store(kept + candidate, score, mask=is_hot & wanted)
    number = tl.sum(comes.to(tl.int32), 0)
    tl.store(counts + head, number)
    tl.store(fetched + head, tl.load(fetched + head) + number)
    tl.store(reads + head, tl.load(reads + head) + (count - hot))
    tl.store(most + head, tl.maximum(tl.load(most + head), number.to(tl.int64)))
