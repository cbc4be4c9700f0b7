"""Split-KV decode attention in Triton over flat ragged storage (flash decoding).

One program per (segment, split) keeps a running maximum and sum over its blocks of keys (Milakov
and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135); a second kernel merges the splits
by their log-sum-exp. A split has the same number of tokens in every segment, so that programs of
long and of short segments take as long; those behind a segment's end return at once. The first
splits are of tokens in fewer bits, where there are any. Lengths are read on the device, and the
grid depends on capacities alone, so that a launch stays valid while segments grow within their
capacity: a CUDA graph may replay it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.profile.costs import scale_group
from hkvprof.runtime.kernels.interface import Extents, QuantisedRows
from hkvprof.runtime.kernels.triton_common import (
    INTERPRETED,
    LEAST_DOT,
    blocks,
    dot,
    narrow,
    padded,
)
from hkvprof.runtime.kernels.triton_rows import (
    along_mean,
    dot_halves,
    read,
    turn,
    turned_halves,
    whole,
)
from hkvprof.selection.residents import RowFormat

PROGRAMS = 512
"""Programs with work that a launch aims at: a few per multiprocessor. Untuned."""
MAX_SPLITS = 64
TILE_BYTES = 16384
"""Of one tile of keys, to fit two of keys and two of values in 96 KiB of shared memory."""
FEW_TOKENS = 32
"""In fewer bits, at a time: their codes are in registers, each by itself."""
LOG2_E = 1.4426950408889634
EMPTY = tl.constexpr(-float("inf"))


@triton.jit
def _rise(logits: tl.tensor, top: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The maximum with a block's logits, weights by it, and what earlier weights fade by."""
    higher = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(higher == EMPTY, 0.0, higher)
    return higher, tl.exp2(logits - base[:, None]), tl.exp2(top - base)


@triton.jit
def _exact_tokens(
    key: tl.tensor,
    value: tl.tensor,
    q: tl.tensor,
    first: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Weighted values, largest logit and sum of weights over rows first + begin to first + end."""
    channels = tl.arange(0, WIDTH)
    top = tl.full([GROUP], EMPTY, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    out = tl.zeros([GROUP, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = token < end
        where = (first + token)[:, None] * DIM + channels[None, :]
        inside = here[:, None] & (channels[None, :] < DIM)
        k = tl.load(key + where, mask=inside, other=0.0)
        logits = dot(q, tl.trans(k), UPCAST) * scale
        logits = tl.where(here[None, :], logits, EMPTY)
        top, weight, fade = _rise(logits, top)
        total = total * fade + tl.sum(weight, 1)
        v = tl.load(value + where, mask=inside, other=0.0)
        if UPCAST:
            out = out * fade[:, None] + dot(weight, v, UPCAST)
        else:
            out = out * fade[:, None] + dot(weight.to(v.dtype), v, UPCAST)
    return out, top, total


@triton.jit
def _few_bit_tokens(
    rows: tl.tensor,
    mean: tl.tensor,
    q: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The same over tokens `begin` to `end` of `rows`.

    Weights of values have their scales in them, and a maximum of their own (`peak`), so that none
    that counts is too small for float16.
    """
    q_low, q_high, most = turned_halves(q, GROUP, DIM, WIDTH, RUN, FLOAT)
    most = most * scale
    bias = along_mean(q, mean, DIM, WIDTH) * scale
    half: tl.constexpr = DIM * BITS // 8 + (2 if BITS == 8 else 2 * (DIM // RUN))
    top = tl.full([GROUP], EMPTY, tl.float32)
    peak = tl.full([GROUP], EMPTY, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    out_low = tl.zeros([GROUP, WIDTH // 2], tl.float32)
    out_high = tl.zeros([GROUP, WIDTH // 2], tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = token < end
        low, high, size = read(rows, token, here, BITS, DIM, WIDTH, BLOCK, RUN, FLOAT)
        logits = dot_halves(q_low, q_high, low, high, UPCAST)
        logits = logits * most[:, None] * size[None, :] + bias[:, None]
        logits = tl.where(here[None, :], logits, EMPTY)
        top, weight, fade = _rise(logits, top)
        total = total * fade + tl.sum(weight, 1)
        low, high, size = read(rows + half, token, here, BITS, DIM, WIDTH, BLOCK, RUN, FLOAT)
        peak, weight, fade = _rise(logits + tl.log2(size)[None, :], peak)
        share = weight.to(FLOAT)
        out_low = out_low * fade[:, None] + dot(share, low, UPCAST)
        out_high = out_high * fade[:, None] + dot(share, high, UPCAST)
    turned = whole(out_low, out_high, GROUP, WIDTH, RUN)
    turned *= tl.exp2(tl.where(peak == EMPTY, EMPTY, peak - top))[:, None]
    channels = tl.arange(0, WIDTH)
    value = tl.load(mean + DIM + channels, mask=channels < DIM, other=0.0).to(tl.float32)
    out = turn(turned, GROUP, DIM, WIDTH) + total[:, None] * value[None, :]
    return out, top, total


@triton.jit
def _held(
    places: tl.tensor, entries: tl.tensor, segment: tl.tensor, ENTRIES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What a segment holds in fewer bits: its entry, first byte and tokens (0 if nothing)."""
    number = tl.arange(0, ENTRIES)
    inside = number < entries
    own = inside & (tl.load(places + 3 * number, mask=inside, other=-1) == segment)
    start = tl.load(places + 3 * number + 1, mask=own, other=0)
    count = tl.load(places + 3 * number + 2, mask=own, other=0)
    return tl.sum(tl.where(own, number, 0), 0), tl.sum(start, 0), tl.sum(count, 0)


@triton.jit
def _few_bits(
    eights: tl.tensor,
    fours: tl.tensor,
    mean: tl.tensor,
    four: tl.tensor,
    q: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    HAS_8: tl.constexpr,
    HAS_4: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """`_few_bit_tokens` of 8 or, where `four` says so, 4 bits; without code for bits nobody has.

    `eights` and `fours` are one address, told to be a multiple of what rows of those bits are.
    """
    if HAS_8 and HAS_4:
        if four:
            out, top, total = _few_bit_tokens(
                fours, mean, q, begin, end, scale, 4, RUN, GROUP, DIM, WIDTH, BLOCK, FLOAT, UPCAST
            )
        else:
            out, top, total = _few_bit_tokens(
                eights, mean, q, begin, end, scale, 8, WIDTH,
                GROUP, DIM, WIDTH, BLOCK, FLOAT, UPCAST,
            )  # fmt: skip
    elif HAS_4:
        out, top, total = _few_bit_tokens(
            fours, mean, q, begin, end, scale, 4, RUN, GROUP, DIM, WIDTH, BLOCK, FLOAT, UPCAST
        )
    else:
        out, top, total = _few_bit_tokens(
            eights, mean, q, begin, end, scale, 8, WIDTH, GROUP, DIM, WIDTH, BLOCK, FLOAT, UPCAST
        )
    return out, top, total


@triton.jit
def _split_kernel(
    key: tl.tensor,
    value: tl.tensor,
    query: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    rows: tl.tensor,
    mean: tl.tensor,
    places: tl.tensor,
    entries: tl.tensor,
    eights: tl.tensor,
    part_out: tl.tensor,
    part_top: tl.tensor,
    part_sum: tl.tensor,
    scale: tl.tensor,
    group: tl.tensor,
    splits: tl.tensor,
    few_splits: tl.tensor,
    share: tl.tensor,
    share_8: tl.tensor,
    share_4: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    HAS_8: tl.constexpr,
    HAS_4: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN_4: tl.constexpr,
    FEW_BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Attention of one segment's query heads over one split; `scale` has log2(e) folded in.

    The first `few_splits` splits are of tokens in fewer bits, in 4 bits those whose rows begin
    before byte `eights`.
    """
    segment = tl.program_id(0)
    split = tl.program_id(1)
    heads = tl.arange(0, GROUP)
    channels = tl.arange(0, WIDTH)
    real = (heads[:, None] < group) & (channels[None, :] < DIM)
    own = (segment * group + heads[:, None]) * DIM + channels[None, :]
    first = tl.load(starts + segment).to(tl.int64)
    length = tl.load(ends + segment) - first.to(tl.int32)
    begin = split * share
    if ENTRIES > 0:
        entry, start, count = _held(places, entries, segment, ENTRIES)
        few = split < few_splits
        four = start < eights
        share = tl.where(few, tl.where(four, share_4, share_8), share)
        length = tl.where(few, count, length)
        begin = (split - tl.where(few, 0, few_splits)) * share
    if begin >= length:
        return
    end = tl.minimum(begin + share, length)
    q = tl.load(query + own, mask=real, other=0.0)
    if ENTRIES > 0:
        if few:
            own_mean = mean + entry.to(tl.int64) * (2 * DIM)
            # Said where the address is made: it would be lost with the argument of a function.
            by_four = tl.multiple_of(rows + start, 4)
            wide = tl.multiple_of(rows + start, ALIGN_4)
            out, top, total = _few_bits(
                by_four, wide, own_mean, four, q, begin, end, scale, HAS_8, HAS_4, RUN,
                GROUP, DIM, WIDTH, FEW_BLOCK, FLOAT, UPCAST,
            )  # fmt: skip
        else:
            out, top, total = _exact_tokens(
                key, value, q, first, begin, end, scale, GROUP, DIM, WIDTH, BLOCK, UPCAST
            )
    else:
        out, top, total = _exact_tokens(
            key, value, q, first, begin, end, scale, GROUP, DIM, WIDTH, BLOCK, UPCAST
        )
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
    places: tl.tensor,
    entries: tl.tensor,
    eights: tl.tensor,
    result: tl.tensor,
    group: tl.tensor,
    splits: tl.tensor,
    few_splits: tl.tensor,
    share: tl.tensor,
    share_8: tl.tensor,
    share_4: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One query head's output from its splits; zeros where the segment is empty."""
    segment = tl.program_id(0)
    head = tl.program_id(1)
    channels = tl.arange(0, WIDTH)
    inside = channels < DIM
    length = tl.load(ends + segment) - tl.load(starts + segment)
    used = tl.cdiv(length, share)
    few = 0
    if ENTRIES > 0:
        _, start, count = _held(places, entries, segment, ENTRIES)
        few = tl.cdiv(count, tl.where(start < eights, share_4, share_8))
    number = tl.arange(0, SPLITS)
    number = tl.where(number < few, number, number - few + few_splits)
    parts = (segment * splits + number) * group + head
    top = tl.load(part_top + parts, mask=number < few_splits + used, other=-float("inf"))
    top = tl.max(top, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    out = tl.zeros([WIDTH], tl.float32)
    total = 0.0
    for n in range(few + used):
        split = n if n < few else n - few + few_splits
        part = (segment * splits + split) * group + head
        weight = tl.exp2(tl.load(part_top + part) - base)
        total += weight * tl.load(part_sum + part)
        out += weight * tl.load(part_out + part * DIM + channels, mask=inside, other=0.0)
    if few + used > 0:
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


@dataclass(frozen=True)
class Splits:
    """Into how many splits segments are cut: `few` of tokens in fewer bits, then the others.

    `shares`: tokens of a split, exact ones, in 8 bits, in 4 bits; about as many bytes each.
    """

    few: int
    exact: int
    shares: tuple[int, int, int]

    @classmethod
    def of(
        cls, key: Tensor, longest: int, block: int, programs: int, held: QuantisedRows | None
    ) -> Splits:
        """Such that about `programs` programs have work, if all segments are full."""
        unit = 2 * key.shape[1] * key.element_size()
        goal = (len(key) * unit + (0 if held is None else len(held.rows))) // programs
        sizes = {} if held is None else held.sizes
        kinds = [(longest, unit), *(sizes.get(bits, (0, unit)) for bits in (8, 4))]
        least = [max(goal // row, -(-most // MAX_SPLITS)) for most, row in kinds]
        shares = [block * blocks(tokens, block) for tokens in least]
        exact, *few = (-(-most // share) for (most, _), share in zip(kinds, shares, strict=True))
        return cls(max(few), max(1, exact), (shares[0], shares[1], shares[2]))


def attend(
    key: Float[Tensor, "capacity dim"],
    value: Float[Tensor, "capacity dim"],
    extents: Extents,
    query: Float[Tensor, "segments group dim"],
    scaling: float,
    held: QuantisedRows | None = None,
    programs: int = PROGRAMS,
) -> Float[Tensor, "segments group dim"]:
    """Attention of one new token per row, also to what segments hold in fewer bits."""
    segments, group, dim = query.shape
    width = padded(dim, 2 * LEAST_DOT if held is not None else LEAST_DOT)
    block = min(128, max(16, TILE_BYTES // (width * key.element_size())))
    cut = Splits.of(key, extents.longest, block, programs, held)
    splits = cut.few + cut.exact
    count = segments * splits * group
    scratch = torch.empty(count * (dim + 2), dtype=torch.float32, device=key.device)
    parts = scratch.split([count * dim, count, count])
    out = torch.empty_like(query)
    ends = (extents.device_starts, extents.device_ends)
    rows, mean, places, entries, eights = _told(held, extents)
    found = 0 if held is None else padded(entries)
    counts = (group, splits, cut.few, *cut.shares)
    bits = () if held is None else held.sizes
    run = scale_group(4, dim)
    row_4 = RowFormat(4, dim).row_bytes
    _split_kernel[(segments, splits)](
        key, value, query, *ends, rows, mean, places, entries, eights, *parts, scaling * LOG2_E,
        *counts, GROUP=padded(group), DIM=dim, WIDTH=width, BLOCK=block, ENTRIES=found,
        HAS_8=8 in bits, HAS_4=4 in bits, RUN=run, ALIGN_4=row_4 & -row_4,
        FEW_BLOCK=max(LEAST_DOT, min(FEW_TOKENS, block)),
        FLOAT=tl.float32 if key.dtype == torch.float32 else tl.float16, UPCAST=INTERPRETED,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _merge_kernel[(segments, group)](
        *parts, *ends, places, entries, eights, out, *counts, DIM=dim, WIDTH=width,
        SPLITS=padded(splits, 1), ENTRIES=found, UPCAST=INTERPRETED, num_warps=2,
    )  # fmt: skip
    return out


def _told(held: QuantisedRows | None, extents: Extents) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """What kernels are told of tokens in fewer bits; something of the right kind where none are."""
    if held is None:
        none = extents.device_starts
        return none, none, none, 0, 0
    return held.rows, held.mean, held.places, len(held.segments), held.eights
