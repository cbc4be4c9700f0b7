"""Attention of a prompt's text rows, in blocks, and its sparsity (HybridKV, stage 1).

Calibration and the runtime's monitor share these functions. No more than BLOCK weights are held at
a time: memory grows neither with heads nor with rows x tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hkvprof.lazy import no_triton

MOST_ROWS = 64
BLOCK = 2**20
"""Attention weights held at a time: 4 MiB in float32, and a few copies of it."""
_UNSEEN = -1e30
"""Logit of a key that a row does not see: finite, because entropy multiplies it by its weight."""


def sample_text_rows(text: Bool[Tensor, " tokens"], limit: int = MOST_ROWS) -> Int[Tensor, " rows"]:
    """Up to `limit` text positions, evenly spread, from the first non-text position on.

    Falls back to all text rows where the prompt is text alone.
    """
    others = (~text).nonzero()[:, 0]
    after = int(others[0]) if len(others) else 0
    rows = text.nonzero()[:, 0]
    rows = rows[rows >= after]
    if len(rows) <= limit:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, limit, device=rows.device).long()]


@dataclass(frozen=True)
class Block:
    """Attention of some lines, each one row of one query head, over all that any of them sees.

    `rows` [lines] are their positions. `shifted` are logits less their line's largest, `weight`
    their exponentials (0 for what a line does not see) and `total` the sums of these.
    """

    rows: Int[Tensor, " lines"]
    shifted: Float[Tensor, "lines seen"]
    weight: Float[Tensor, "lines seen"]
    total: Float[Tensor, " lines"]


def attention_blocks(
    query: Float[Tensor, "group rows dim"],
    key: Float[Tensor, "tokens dim"],
    rows: Int[Tensor, " rows"],
    scaling: float,
) -> Iterator[Block]:
    """Blocks of at most BLOCK weights (or one line), row by row, a row's query heads in order.

    `rows` ascend; a row sees the keys up to its own.
    """
    lines = query.transpose(0, 1).flatten(0, 1).float()
    key = key.float()
    own = rows.repeat_interleave(len(query))
    ends = [row + 1 for row in own.tolist()]
    first = 0
    while first < len(ends):
        last = first + 1
        while last < len(ends) and (last + 1 - first) * ends[last] <= BLOCK:
            last += 1
        seen, surely = ends[last - 1], ends[first]
        logits = torch.matmul(lines[first:last], key[:seen].T).mul_(scaling)
        future = torch.arange(surely, seen, device=key.device) > own[first:last, None]
        logits[:, surely:].masked_fill_(future, _UNSEEN)
        logits -= logits.amax(dim=-1, keepdim=True)
        weight = logits.exp()
        yield Block(own[first:last], logits, weight, weight.sum(dim=-1))
        first = last


def text_sparsity(
    query: Float[Tensor, "query_heads rows dim"],
    key: Float[Tensor, "kv_heads tokens dim"],
    rows: Int[Tensor, " rows"],
    scaling: float,
    kappas: tuple[float, ...],
) -> Float[Tensor, "kappas query_heads"]:
    """Text-centric sparsity (HybridKV, stage 1): mean over text rows of the top-k attention mass.

    Row i sees its i + 1 first tokens; k = ceil(kappa * (i + 1)). On CUDA with triton the weights
    are counted in bins (triton_mass), elsewhere they are sorted.
    """
    group = len(query) // len(key)
    if is_counted(key):
        from hkvprof.selection.triton_mass import top_mass

        most = max(1, math.ceil(max(kappas) * int(rows.max() + 1)))
        counts = torch.stack([_count(kappa, rows).clamp(1, most) for kappa in kappas])
        return top_mass(query, key, rows, scaling, counts)
    result = []
    for head in range(len(key)):
        mine = query[head * group : (head + 1) * group]
        blocks = attention_blocks(mine, key[head], rows, scaling)
        result.append(mean_over_rows([top_mass_of(block, kappas) for block in blocks], group))
    return torch.cat(result, dim=-1)


def is_counted(key: Tensor) -> bool:
    """Whether triton counts weights in bins."""
    return key.is_cuda and not no_triton()


def mean_over_rows(
    lines: list[Float[Tensor, "figures lines"]], group: int
) -> Float[Tensor, "figures group"]:
    """Figures of blocks of lines (rows, and in them query heads), averaged over the rows."""
    whole = torch.cat(lines, dim=-1)
    return whole.view(len(whole), -1, group).mean(dim=1)


def _count(kappa: float, rows: Int[Tensor, "*lines"]) -> Int[Tensor, "*lines"]:
    return (kappa * (rows + 1)).ceil().long().clamp(min=1)


def top_mass_of(block: Block, kappas: tuple[float, ...]) -> Float[Tensor, "kappas lines"]:
    """Share of the largest weights; leaves the block's weights in another order."""
    counts = torch.stack([_count(kappa, block.rows) for kappa in kappas])
    summed = largest(block.weight, int(counts.max())).cumsum(dim=-1)
    return summed.gather(-1, counts.T - 1).T / block.total


def largest(weight: Float[Tensor, "lines seen"], count: int) -> Float[Tensor, "lines count"]:
    """The largest of every line, in falling order; on the CPU `weight` is sorted in place.

    numpy sorts with vector instructions, nine times as fast as torch.topk where there is AVX-512.
    """
    if weight.device.type != "cpu":
        return weight.topk(count, dim=-1).values
    weight.numpy().sort(axis=-1)
    return weight[:, -count:].flip(-1)
