"""What a prompt's text rows attend to, one layer at a time: sparsity, mass by modality, entropy.

All three come from the same weights (policy.text_rows), a block at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.head_statistics import CLASSES
from hkvprof.heads import KeepRule, Modality
from hkvprof.policy.text_rows import (
    Block,
    attention_blocks,
    is_counted,
    mean_over_rows,
    text_sparsity,
    top_mass_of,
)


@dataclass(frozen=True)
class TextStatistics:
    """Means over text rows, per query head.

    `sparsity` [kappas, query_heads] (HybridKV, stage 1) is the mass of the ceil(kappa n) largest
    of a row's n weights; `mass` [CLASSES, query_heads] sums to 1 over the classes; `entropy`
    [query_heads] is that of the weights over log n, from 0 (one key) to 1 (all keys alike).
    """

    sparsity: Float[Tensor, "kappas query_heads"]
    mass: Float[Tensor, "classes query_heads"]
    entropy: Float[Tensor, " query_heads"]


def text_statistics(
    query: Float[Tensor, "query_heads tokens dim"],
    key: Float[Tensor, "kv_heads tokens dim"],
    rows: Int[Tensor, " rows"],
    scaling: float,
    kappas: tuple[float, ...],
    classes: Float[Tensor, "tokens owners"],
    recent: int,
) -> TextStatistics:
    """All statistics of a layer's text rows. `classes` is as `token_classes` makes it."""
    group = len(query) // len(key)
    counted = is_counted(key)
    figures = []
    for head in range(len(key)):
        mine = query[head * group : (head + 1) * group, rows]
        lines = []
        for block in attention_blocks(mine, key[head], rows, scaling):
            found = [mass_by_class(block, classes, recent), entropy(block)[None]]
            if not counted:  # last: it sorts the weights in place
                found.append(top_mass_of(block, kappas))
            lines.append(torch.cat(found))
        figures.append(mean_over_rows(lines, group))
    whole = torch.cat(figures, dim=-1)
    count = len(CLASSES)
    sparsity = whole[count + 1 :]
    if counted:
        sparsity = text_sparsity(query[:, rows], key, rows, scaling, kappas)
    return TextStatistics(sparsity, whole[:count], whole[count])


def token_classes(
    modality: Int[Tensor, " tokens"], keep: KeepRule
) -> Float[Tensor, "tokens owners"]:
    """One-hot rows over CLASSES without the last: sinks, else text, image or video.

    Which tokens are recent depends on the row that looks. Long text in the place of vision tokens
    (Modality.CONTEXT) counts as text.
    """
    kinds = modality.long()
    owner = torch.full_like(kinds, CLASSES.index("text"))
    owner[kinds == Modality.IMAGE] = CLASSES.index("image")
    owner[kinds == Modality.VIDEO] = CLASSES.index("video")
    owner[: keep.sinks] = CLASSES.index("sinks")
    return torch.nn.functional.one_hot(owner, len(CLASSES) - 1).float()


def mass_by_class(
    block: Block, classes: Float[Tensor, "tokens owners"], recent: int
) -> Float[Tensor, "classes lines"]:
    """Attention on sinks, on the `recent` last keys that the row sees, and on others by modality.

    A key that is a sink counts as such alone.
    """
    seen = block.weight.shape[1]
    back = torch.arange(min(recent, seen), device=block.rows.device)
    late = block.rows[:, None] - back
    others = classes[:, CLASSES.index("sinks")] == 0
    at = late.clamp(min=0)
    near = block.weight.gather(-1, at) * (late >= 0) * others[at]
    mass = block.weight @ classes[:seen]
    mass -= torch.einsum("lr,lrc->lc", near, classes[at])
    mass = torch.cat([mass.clamp(min=0), near.sum(dim=-1, keepdim=True)], dim=-1)
    return (mass / mass.sum(dim=-1, keepdim=True)).T


def entropy(block: Block) -> Float[Tensor, " lines"]:
    """Of a line's weights, over the logarithm of how many keys it sees; 0 where that is one."""
    spread = block.total.log() - (block.weight * block.shifted).sum(dim=-1) / block.total
    return (spread / (block.rows + 1).clamp(min=2).log()).clamp(0, 1)
