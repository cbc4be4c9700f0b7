"""Exact scores of picked items in Triton, by their keys in pinned host memory (triton_gather)."""

from __future__ import annotations

import triton
import triton.language as tl

from hkvprof.runtime.kernels.triton_common import (
    BASE,
    HOST,
    ITEMS,
    PER_GROUP,
    PICKED,
    SCALE,
    address,
    dot,
    field,
    idle,
    narrow,
    small,
)
from hkvprof.runtime.kernels.triton_scores import put, queries


@triton.jit
def exact_kernel(
    heads: tl.tensor,
    which: tl.tensor,
    query: tl.tensor,
    picked: tl.tensor,
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
    INT8: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Logits of the picked items by their keys in host memory; and -1 for all scores, for now.

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
    if INT8:
        data = tl.load(address(heads, head, HOST, tl.int8) + where, mask=inside, other=0)
        owner = item // field(heads, head, PER_GROUP)
        unit = address(heads, head, SCALE, tl.float32) + owner[:, None] * (2 * DIM) + d[None, :]
        k = data.to(tl.float32) * tl.load(unit, mask=inside, other=0.0)
        k = narrow(k, query.dtype.element_ty, UPCAST)
    else:
        host = address(heads, head, HOST, query.dtype.element_ty)
        k = tl.load(host + where, mask=inside, other=0.0)
    total = dot(q, tl.trans(k), UPCAST) * scale
    total = tl.where(tl.abs(total) < float("inf"), total, -float("inf"))
    put(total, logits, tops, sums, heads, head, block, number, count, group, GROUP)
