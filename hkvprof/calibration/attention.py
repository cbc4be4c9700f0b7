"""What a prompt's text rows attend to, one layer at a time: sparsity, mass by modality, entropy.

All three come from the same weights (selection.sparsity), a block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.heads import HeadGrid, KeepRule, Modality
from hkvprof.profile.bounds import expect, require
from hkvprof.profile.tables import CLASSES, PAIRS, HeadStatistics, check_sums
from hkvprof.selection.sparsity import (
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
        asked = query[head * group : (head + 1) * group, rows]
        lines = []
        for block in attention_blocks(asked, key[head], rows, scaling):
            block_figures = [mass_by_class(block, classes, recent), entropy(block)[None]]
            if not counted:  # last: it sorts the weights in place
                block_figures.append(top_mass_of(block, kappas))
            lines.append(torch.cat(block_figures))
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


SHARE = 0.10
"""Of the tokens between sinks and recent ones: what a kept set holds."""


@dataclass(frozen=True)
class Phase:
    """Rows that look at a prompt: `query` [query_heads, rows, dim] at `rows`, ascending positions
    in prompt and continuation; perhaps none."""

    query: Float[Tensor, "query_heads rows dim"]
    rows: Int[Tensor, " rows"]


def compared(phases: Sequence[Phase]) -> Bool[Tensor, " pairs"]:
    """Which of PAIRS have rows on both sides."""
    return torch.tensor([bool(len(a.rows) and len(b.rows)) for a, b in combinations(phases, 2)])


def layer_drift(
    phases: Sequence[Phase],
    key: Float[Tensor, "kv_heads all dim"],
    tokens: int,
    scaling: float,
    keep: KeepRule,
) -> Float[Tensor, "pairs query_heads"]:
    """Shared part of the kept sets of the three phases of PAIRS; 0 for a pair that is not there.

    `key` holds prompt (`tokens`) and continuation. By chance it is SHARE.
    """
    heads = len(phases[0].query)
    group = heads // len(key)
    result = torch.zeros(len(PAIRS), heads, device=key.device)
    for owner in range(len(key)):
        keys = key[owner].float()
        for head in range(owner * group, (owner + 1) * group):
            sets = [kept_set(phase, head, keys, tokens, scaling, keep) for phase in phases]
            for number, (first, second) in enumerate(combinations(sets, 2)):
                if first is not None and second is not None:
                    result[number, head] = (first & second).sum() / first.sum()
    return result


def kept_set(
    phase: Phase,
    head: int,
    key: Float[Tensor, "all dim"],
    tokens: int,
    scaling: float,
    keep: KeepRule,
) -> Bool[Tensor, " candidates"] | None:
    """Which tokens between sinks and recent ones a query head alone would keep; None without rows.

    Scored as the runtime scores (selection.static): softmax per row, maximum over rows. Sinks and
    recent tokens are always kept, and left out: they would make all sets alike.
    """
    if not len(phase.rows):
        return None
    score = key.new_zeros(tokens)
    for block in attention_blocks(phase.query[head : head + 1], key, phase.rows, scaling):
        share = block.weight[:, :tokens].div_(block.total[:, None]).amax(dim=0)
        score[: len(share)] = torch.maximum(score[: len(share)], share)
    score = score[keep.sinks : tokens - keep.recent]
    best = score.topk(math.ceil(SHARE * len(score))).indices
    return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, best, True)


_BOUNDED = ("modality_mass", "entropy", "drift")


@dataclass(frozen=True, eq=False)
class SampleStatistics:
    """Of one sample; L layers, Hq query heads.

    `modality_mass` [CLASSES, L, Hq] and `entropy` [L, Hq] of its text rows
    (text_rows.TextStatistics), `drift` [PAIRS, L, Hq] (drift.layer_drift), 0 for the pairs that the
    sample does not have: `compared` [PAIRS] is 1 for those that it has.
    """

    modality_mass: NDArray[np.float32]
    entropy: NDArray[np.float32]
    drift: NDArray[np.float32]
    compared: NDArray[np.uint8]

    @classmethod
    def names(cls) -> list[str]:
        """Of the arrays, as they stand in a row's file."""
        return [entry.name for entry in fields(cls)]

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names."""
        return {name: getattr(self, name) for name in self.names()}

    @classmethod
    def take(cls, named: dict[str, NDArray[Any]]) -> SampleStatistics:
        """Move the arrays out of `named`. Raises KeyError."""
        return cls(**{name: named.pop(name) for name in cls.names()})

    def check(self, grid: HeadGrid) -> None:
        """Raise ProfileError unless shapes and bounds hold."""
        heads = (grid.layers, grid.query_heads)
        expect("modality_mass", self.modality_mass, (len(CLASSES), *heads), np.float32)
        expect("entropy", self.entropy, heads, np.float32)
        expect("drift", self.drift, (len(PAIRS), *heads), np.float32)
        expect("compared", self.compared, (len(PAIRS),), np.uint8)
        for name in _BOUNDED:
            values = getattr(self, name)
            within = bool((values >= 0).all()) and bool((values <= 1).all())
            require(within, f"{name} holds values outside [0, 1]")
        check_sums("modality_mass", self.modality_mass)
        require(bool((self.compared <= 1).all()), "compared holds more than 1")


def mean_statistics(samples: Iterable[SampleStatistics]) -> HeadStatistics:
    """Of one sample or more, in float64; drift over those that have the pair."""
    rows = list(samples)
    mass = np.stack([row.modality_mass for row in rows]).astype(np.float64)
    entropy = np.stack([row.entropy for row in rows]).astype(np.float64)
    compared = np.stack([row.compared for row in rows]).astype(np.int64)
    drift = np.zeros(rows[0].drift.shape)
    for row in rows:
        drift += row.drift.astype(np.float64) * row.compared[:, None, None]
    count = compared.sum(axis=0)
    return HeadStatistics(
        modality_mass_mean=mass.mean(axis=0).astype(np.float32),
        modality_mass_std=mass.std(axis=0).astype(np.float32),
        entropy_mean=entropy.mean(axis=0).astype(np.float32),
        entropy_std=entropy.std(axis=0).astype(np.float32),
        drift_mean=(drift / np.maximum(count, 1)[:, None, None]).astype(np.float32),
        drift_samples=count.astype(np.int32),
    )
