"""Tokens in fewer bits in Triton (selection.residents.RowFormat): read as they lie, never decoded.

Of a block of tokens codes come as two tiles, low and high: their dot products with the two halves
of a query add up. In 8 bits these are the first and the second half of the channels; in 4 bits, of
every run of channels that share a scale, those in the low and in the high halves of bytes. Codes
are exact in float16 by the bits of 1024 + n. One scale per token is left to the logits, or to the
weights; in 4 bits the scales of a token's runs, as shares of the largest, are in the tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hkvprof.runtime.kernels.triton_common import dot


@triton.jit
def _butterfly(
    x: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr
) -> tl.tensor:
    """Sums and differences of channels that lie HALF apart."""
    pairs = tl.permute(tl.reshape(x, [ROWS, WIDTH // (2 * HALF), 2, HALF]), [0, 1, 3, 2])
    a, b = tl.split(pairs)
    both = tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2])
    return tl.reshape(both, [ROWS, WIDTH])


@triton.jit
def turn(x: tl.tensor, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Rows [ROWS, WIDTH] in float32 into the rotated space, or back (residents.hadamard)."""
    block: tl.constexpr = DIM & -DIM
    for step in tl.static_range(8):
        if 2**step < block:
            x = _butterfly(x, ROWS, WIDTH, 2**step)
    return x * (block**-0.5)


@triton.jit
def halves(
    x: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Rows [ROWS, WIDTH] by the halves of their runs: [ROWS, WIDTH / 2], twice."""
    runs = tl.permute(tl.reshape(x, [ROWS, WIDTH // RUN, 2, RUN // 2]), [0, 1, 3, 2])
    low, high = tl.split(runs)
    return tl.reshape(low, [ROWS, WIDTH // 2]), tl.reshape(high, [ROWS, WIDTH // 2])


@triton.jit
def whole(
    low: tl.tensor,
    high: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
) -> tl.tensor:
    """What `halves` took apart."""
    low = tl.reshape(low, [ROWS, WIDTH // RUN, RUN // 2])
    both = tl.join(low, tl.reshape(high, [ROWS, WIDTH // RUN, RUN // 2]))
    return tl.reshape(tl.permute(both, [0, 1, 3, 2]), [ROWS, WIDTH])


@triton.jit
def _levels(bits: tl.tensor, ZERO: tl.constexpr, FLOAT: tl.constexpr) -> tl.tensor:
    """Numbers n - ZERO, where `bits` are those of 1024 + n in float16, n below 1024."""
    return (bits.to(tl.float16, bitcast=True) - (1024.0 + ZERO)).to(FLOAT)


@triton.jit
def _read_8(
    part: tl.tensor,
    token: tl.tensor,
    here: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    FLOAT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """See `read`."""
    half: tl.constexpr = WIDTH // 2
    d = tl.arange(0, half)
    at = part + (token * (2 * (DIM + 2)))[:, None] + d[None, :]
    low = tl.load(at, mask=here[:, None] & (d < DIM)[None, :], other=0)
    high = tl.load(at + half, mask=here[:, None] & (d < DIM - half)[None, :], other=0)
    scales = (part + DIM).to(tl.pointer_type(tl.float16))
    scale = tl.load(scales + token * (DIM + 2), mask=here, other=0.0).to(tl.float32)
    low = _levels(low.to(tl.int16) ^ 0x6480, 128, FLOAT)
    return low, _levels(high.to(tl.int16) ^ 0x6480, 128, FLOAT), scale


@triton.jit
def _read_4(
    part: tl.tensor,
    token: tl.tensor,
    here: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    FLOAT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """See `read`. A byte's codes c are taken as 2 c - 15."""
    half: tl.constexpr = DIM // 2 + 2 * (DIM // RUN)
    j = tl.arange(0, RUN // 2)
    r = tl.arange(0, WIDTH // RUN)
    inside = here[:, None] & (r < DIM // RUN)[None, :]
    first = (token * (2 * half))[:, None] + (r * (RUN // 2))[None, :]
    at = part + first[:, :, None] + j[None, None, :]
    byte = tl.load(at, mask=inside[:, :, None], other=0).to(tl.int16)
    where = (part + DIM // 2).to(tl.pointer_type(tl.float16))
    scales = tl.load(where + (token * half)[:, None] + r[None, :], mask=inside, other=0.0)
    scales = scales.to(tl.float32)
    scale = tl.max(scales, 1)
    share = (scales / tl.where(scale > 0, scale, 1.0)[:, None]).to(FLOAT)[:, :, None]
    low = _levels(((byte << 1) & 30) | 0x6400, 15, FLOAT) * share
    high = _levels(((byte >> 3) & 30) | 0x6400, 15, FLOAT) * share
    low = tl.reshape(low, [BLOCK, WIDTH // 2])
    return low, tl.reshape(high, [BLOCK, WIDTH // 2]), scale * 0.5


@triton.jit
def read(
    part: tl.tensor,
    token: tl.tensor,
    here: tl.tensor,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    FLOAT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Keys or values of a block of tokens: tiles [BLOCK, WIDTH / 2] of type FLOAT, and what they
    are still to be multiplied by [BLOCK]; 0 of tokens that are not `here`.

    `part` is the address of the first token's key, or value. RUN channels share a scale; in 8 bits
    it is WIDTH.
    """
    if BITS == 8:
        low, high, scale = _read_8(part, token, here, DIM, WIDTH, FLOAT)
    else:
        low, high, scale = _read_4(part, token, here, DIM, WIDTH, BLOCK, RUN, FLOAT)
    return low, high, scale


@triton.jit
def turned_halves(
    q: tl.tensor,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    FLOAT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Queries [ROWS, WIDTH] in the rotated space, by halves, as shares of their largest channel,
    which comes last [ROWS]."""
    x = turn(q.to(tl.float32), ROWS, DIM, WIDTH)
    most = tl.max(tl.abs(x), 1)
    most = tl.where(most > 0, most, 1.0)
    low, high = halves(x / most[:, None], ROWS, WIDTH, RUN)
    return low.to(FLOAT), high.to(FLOAT), most


@triton.jit
def along_mean(q: tl.tensor, mean: tl.tensor, DIM: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """query . mean of queries [ROWS, WIDTH]; `mean` is the address of DIM numbers."""
    d = tl.arange(0, WIDTH)
    own = tl.load(mean + d, mask=d < DIM, other=0.0).to(tl.float32)
    return tl.sum(q.to(tl.float32) * own[None, :], 1)


@triton.jit
def dot_halves(
    q_low: tl.tensor, q_high: tl.tensor, low: tl.tensor, high: tl.tensor, UPCAST: tl.constexpr
) -> tl.tensor:
    """Products of queries and tokens [ROWS, BLOCK], in float32."""
    return dot(q_low, tl.trans(low), UPCAST) + dot(q_high, tl.trans(high), UPCAST)


@triton.jit
def row_logits(
    q: tl.tensor,
    rows: tl.tensor,
    mean: tl.tensor,
    token: tl.tensor,
    here: tl.tensor,
    scale: tl.tensor,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """Logits [GROUP, BLOCK] of the keys of tokens of `rows`, times `scale`."""
    q_low, q_high, most = turned_halves(q, GROUP, DIM, WIDTH, RUN, FLOAT)
    low, high, size = read(rows, token, here, BITS, DIM, WIDTH, BLOCK, RUN, FLOAT)
    logits = dot_halves(q_low, q_high, low, high, UPCAST) * most[:, None] * size[None, :]
    return (logits + along_mean(q, mean, DIM, WIDTH)[:, None]) * scale


@triton.jit
def key_logits(
    q: tl.tensor,
    exact: tl.tensor,
    rows: tl.tensor,
    mean: tl.tensor,
    token: tl.tensor,
    here: tl.tensor,
    bits: tl.tensor,
    scale: tl.tensor,
    STRIDE: tl.constexpr,
    HAS_8: tl.constexpr,
    HAS_4: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """Logits [GROUP, BLOCK] of tokens' keys: `exact` ones, STRIDE numbers from one to the next,
    where `bits` is 0, else those of `rows`. HAS_8 and HAS_4: which bits there may be."""
    d = tl.arange(0, WIDTH)
    logits = tl.zeros([GROUP, BLOCK], tl.float32)
    if bits == 0:
        inside = here[:, None] & (d < DIM)[None, :]
        k = tl.load(exact + (token * STRIDE)[:, None] + d[None, :], mask=inside, other=0.0)
        logits = dot(q, tl.trans(k), UPCAST) * scale
    if HAS_8:  # noqa: SIM102
        if bits == 8:
            logits = row_logits(
                q, rows, mean, token, here, scale, 8, WIDTH, GROUP, DIM, WIDTH, BLOCK, FLOAT, UPCAST
            )
    if HAS_4:  # noqa: SIM102
        if bits == 4:
            logits = row_logits(
                q, rows, mean, token, here, scale, 4, RUN, GROUP, DIM, WIDTH, BLOCK, FLOAT, UPCAST
            )
    return logits


@triton.jit
def decoded(
    part: tl.tensor,
    mean: tl.tensor,
    token: tl.tensor,
    here: tl.tensor,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Keys or values of tokens [BLOCK, WIDTH] as residents.Residents.decode gives them, float32."""
    low, high, size = read(part, token, here, BITS, DIM, WIDTH, BLOCK, RUN, tl.float32)
    x = turn(whole(low, high, BLOCK, WIDTH, RUN) * size[:, None], BLOCK, DIM, WIDTH)
    d = tl.arange(0, WIDTH)
    return x + tl.load(mean + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _nearest(x: tl.tensor, LEAST: tl.constexpr, MOST: tl.constexpr) -> tl.tensor:
    """The nearest integer, of equals the even one; at least LEAST, at most MOST."""
    x = tl.minimum(tl.maximum(x, LEAST), MOST)
    return ((x + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def encode(
    x: tl.tensor,
    mean: tl.tensor,
    part: tl.tensor,
    token: tl.tensor,
    here: tl.tensor,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write keys or values [BLOCK, WIDTH] (float32, 0 where padded) as residents.Residents.encode
    does, to tokens of the rows whose first key, or value, is at `part`."""
    d = tl.arange(0, WIDTH)
    x -= tl.load(mean + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
    x = turn(x, BLOCK, DIM, WIDTH)
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -3.4028234663852886e38), 3.4028234663852886e38)
    most: tl.constexpr = 127.0 if BITS == 8 else 7.5
    half: tl.constexpr = DIM * BITS // 8 + (2 if BITS == 8 else 2 * (DIM // RUN))
    runs = tl.reshape(x, [BLOCK, WIDTH // RUN, RUN])
    scale = tl.minimum(tl.maximum(tl.max(tl.abs(runs), 2) / most, 2.0**-24), 65504.0)
    scale = scale.to(tl.float16)
    level = tl.reshape(runs / scale.to(tl.float32)[:, :, None], [BLOCK, WIDTH])
    r = tl.arange(0, WIDTH // RUN)
    where = (part + DIM * BITS // 8).to(tl.pointer_type(tl.float16)) + (token * half)[:, None]
    real = here[:, None] & ((r == 0) | (r < DIM // RUN))[None, :]
    tl.store(where + r[None, :], scale, mask=real)
    first = part + (token * (2 * half))[:, None]
    if BITS == 8:
        codes = _nearest(level, -127.0, 127.0)
        tl.store(first + d[None, :], codes.to(tl.uint8), mask=here[:, None] & (d < DIM)[None, :])
    else:
        low, high = halves(level + 7.5, BLOCK, WIDTH, RUN)
        codes = _nearest(low, 0.0, 15.0) | (_nearest(high, 0.0, 15.0) << 4)
        j = tl.arange(0, WIDTH // 2)
        inside = here[:, None] & (j < DIM // 2)[None, :]
        tl.store(first + j[None, :], codes.to(tl.uint8), mask=inside)
