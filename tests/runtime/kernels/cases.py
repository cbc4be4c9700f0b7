"""Random layers for kernel tests, and definitions in float64 that share no code with them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hkvprof.profile.budgets import ANY
from hkvprof.runtime.kernels import DynamicSegment
from hkvprof.selection.index import HeadTables, KeyIndex, MeanIndex, MinMaxIndex, ProjectedIndex
from hkvprof.selection.rotary import Positions, RotatingBias

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRECISION = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}
KINDS = ("mean", "minmax", "projected")

compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None,
    reason="no C++ compiler: the native kernels cannot be tested here",
)


def attend_exactly(
    key: Tensor,
    value: Tensor,
    offsets: Sequence[int],
    lengths: Sequence[int],
    query: Tensor,
    scaling: float,
) -> Tensor:
    """Dense attention of every segment in float64."""
    rows = []
    for segment, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        own = slice(start, start + length)
        logits = query[segment].double() @ key[own].double().T * scaling
        out = logits.softmax(-1) @ value[own].double()
        rows.append(out if length else torch.zeros_like(query[segment]).double())
    return torch.stack(rows)


@dataclass
class Layer:
    """A layer's flat storage and its dynamic heads, one per segment."""

    key: Tensor
    value: Tensor
    heads: list[DynamicSegment]
    query: Tensor

    def copy(self) -> Layer:
        """The same state with memory of its own where kernels write."""
        heads = [
            replace(
                head,
                slots=head.slots.clone(),
                hot_score=None if head.hot_score is None else head.hot_score.clone(),
            )
            for head in self.heads
        ]
        return Layer(self.key.clone(), self.value.clone(), heads, self.query)


def make_layer(
    seed: int,
    kind: str,
    items: Sequence[int],
    hot: Sequence[int],
    *,
    group: int = 7,
    dim: int = 32,
    chunk: int = 1,
    codes: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    int8: bool = False,
    smoothing: bool = False,
    rerank: int = 0,
    fresh: int = ANY,
    bias: str = "",
) -> Layer:
    """Segments of one dynamic head each; hot regions are filled with what the slots say.

    `bias`: keys have one that turns, at positions that count up (`plain`) or are `told`.
    """
    random = torch.Generator().manual_seed(seed)
    margin = 3  # rows before every hot region
    total = sum(h * chunk + margin for h in hot)
    key, value = (torch.randn(total, dim, generator=random).to(dtype) for _ in range(2))
    heads, start = [], 0
    for segment, (count, held) in enumerate(zip(items, hot, strict=True)):
        start += margin
        host = torch.randn(count, 2, chunk, dim, generator=random).to(dtype)
        scale, per_group = None, 1
        if int8:
            per_group = 3
            groups = -(-count // per_group)
            scale = (torch.rand(groups, 2, dim, generator=random) + 0.5) / 64
            host = torch.randint(-127, 128, host.shape, generator=random).to(torch.int8)
        slots = torch.randperm(count, generator=random)[:held].to(torch.int32)
        digests = torch.randn(count, max(1, chunk), dim, generator=random).to(dtype)
        head = DynamicSegment(
            segment=segment,
            index=make_index(kind, digests, codes, random, bias),
            slots=slots,
            host=host,
            hot_start=start,
            chunk=chunk,
            items=count,
            hot_score=torch.rand(held, generator=random) / count if smoothing else None,
            scale=scale,
            items_per_group=per_group,
            rerank=rerank,
            fresh=fresh,
        )
        heads.append(head)
        start += held * chunk
    query = torch.randn(len(heads), group, dim, generator=random).to(dtype)
    made = Layer(key, value, heads, query)
    fill_hot(made)
    return made


def fill_hot(layer: Layer) -> None:
    """Copy into hot slots what the host holds now."""
    for head in layer.heads:
        for slot, item in enumerate(head.slots.tolist()):
            start = head.hot_start + slot * head.chunk
            rows = slice(start, start + head.chunk)
            layer.key[rows], layer.value[rows] = host_item(head, item, layer.key.dtype)


def without_hot(head: DynamicSegment) -> DynamicSegment:
    """As if the host had lost what is hot."""
    host = head.host.clone()
    host[head.slots.long()] = 99
    return replace(head, host=host)


def make_bias(
    dim: int, items: int, random: torch.Generator, axes_are_told: bool
) -> tuple[RotatingBias, Positions]:
    """Up to seven pairs, of which the last is zero; three axes of positions, if any are told."""
    order = torch.randperm(dim // 2, generator=random)[:7]
    pairs = len(order)
    constants = torch.randn(3, pairs, generator=random)
    constants[:2, -1] = 0
    constants[2] = torch.rand(pairs, generator=random) ** 4
    places = torch.stack([order, order + dim // 2, torch.arange(pairs) % 3]).to(torch.int32)
    spots = torch.randint(0, 5000, (3, items + 4), generator=random, dtype=torch.int32)
    told = spots[:, 2 : items + 2] if axes_are_told else None
    return RotatingBias(constants, places), Positions(4321, items, told)


def make_index(
    kind: str, keys: Tensor, codes: int, random: torch.Generator, bias: str = ""
) -> KeyIndex:
    """An index over chunked keys [items, chunk, dim]."""
    if kind == "mean":
        return MeanIndex.build(keys)
    if kind == "minmax":
        return MinMaxIndex.build(keys)
    dim, channels = keys.shape[-1], 2 * codes + 1
    widths = [0, 3, *(2 for _ in range(codes - 2)), 2][-codes:]  # one code without channels
    ends = torch.tensor(widths).cumsum(0).tolist()
    tables = HeadTables(
        query_projection=torch.randn(dim, channels, generator=random) / dim**0.5,
        key_projection=torch.randn(dim, channels, generator=random) / dim**0.5,
        key_mean=torch.zeros(dim),
        codebook=torch.randn(256, channels, generator=random),
        subspaces=tuple(zip([0, *ends[:-1]], ends, strict=True)),
    )
    byte = torch.randint(0, 256, (len(keys), codes), generator=random, dtype=torch.uint8)
    if not bias:
        return ProjectedIndex(byte, tables)
    turning, positions = make_bias(dim, len(keys), random, bias == "told")
    return ProjectedIndex(byte, replace(tables, bias=turning), positions)


def host_item(head: DynamicSegment, item: int, dtype: torch.dtype) -> Tensor:
    """Keys and values [2, chunk, dim] of an item as they must appear in the hot region."""
    data = head.host[item]
    if head.scale is not None:
        data = data.float() * head.scale[item // head.items_per_group][:, None]
    return data.to(dtype)


def shares_exactly(
    head: DynamicSegment, query: Tensor, scaling: float, items: Sequence[int]
) -> Tensor:
    """Shares of attention among these items by their keys in float64, as Retrieval.score says."""
    keys = torch.stack([host_item(head, item, query.dtype)[0, 0] for item in items])
    logits = query.double() @ keys.double().T * scaling
    logits[~logits.isfinite()] = -torch.inf
    return logits.softmax(-1).mean(0)


def wanted_exactly(
    head: DynamicSegment, score: Sequence[float], smoothing: float
) -> tuple[set[int], list[float]]:
    """Items that must be hot afterwards, and d of every item, from interface.Retrieval.load."""
    due = [-1.0 if value != value else value for value in score]
    held = head.slots.tolist()
    if smoothing > 0:
        assert head.hot_score is not None
        for slot, item in enumerate(held):
            kept = torch.tensor(smoothing) * head.hot_score[slot]
            due[item] = max(due[item], float(kept))
    order = sorted(range(len(due)), key=lambda item: (-due[item], item not in held, item))
    best = set(order[: len(held)])
    new = [item for item in order if item in best and item not in held][: head.fresh]
    old = [item for item in order if item in held]
    return {*new, *old[: len(held) - len(new)]}, due


def check_loaded(
    before: Layer,
    after: Layer,
    scores: list[Tensor],
    counts: list[int],
    smoothing: float,
) -> None:
    """What Retrieval.load promises."""
    outside = torch.ones(len(after.key), dtype=torch.bool)
    for old, head, score, count in zip(before.heads, after.heads, scores, counts, strict=True):
        wanted, due = wanted_exactly(old, score.tolist(), smoothing)
        held = head.slots.tolist()
        assert set(held) == wanted
        kept = sum(a == b for a, b in zip(old.slots.tolist(), held, strict=True))
        assert count == len(held) - kept == len(wanted - set(old.slots.tolist()))
        for slot, item in enumerate(held):
            start = head.hot_start + slot * head.chunk
            rows = slice(start, start + head.chunk)
            key, value = host_item(head, item, after.key.dtype)
            assert torch.equal(after.key[rows], key)
            assert torch.equal(after.value[rows], value)
            outside[rows] = False
        if head.hot_score is not None:
            assert torch.equal(head.hot_score, torch.tensor([due[item] for item in held]))
    assert torch.equal(after.key[outside], before.key[outside])
