"""Random layers for kernel tests, and definitions in float64 that share no code with them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from hkvprof.profile.budgets import ANY
from hkvprof.runtime.kernels import DynamicSegment
from hkvprof.selection.index import HeadTables, KeyIndex, MeanIndex, MinMaxIndex, ProjectedIndex
from hkvprof.selection.residents import Residents
from hkvprof.selection.rotary import Positions, RotatingBias

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRECISION = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}
KINDS = ("mean", "minmax", "projected")
BITS = ((16, 16), (16, 8), (8, 16), (8, 8), (4, 16))
"""Of hot slots and of host items; 16: they are as they were."""

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
                held=head.held and replace(head.held, rows=head.held.rows.clone()),
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
    bits: tuple[int, int] = BITS[0],
    smoothing: bool = False,
    rerank: int = 0,
    fresh: int = ANY,
    bias: str = "",
) -> Layer:
    """Segments of one dynamic head each; hot regions are filled with what the slots say.

    `bits`: of hot slots and of host items. `bias`: keys have one that turns, at positions that
    count up (`plain`) or are `told`.
    """
    random = torch.Generator().manual_seed(seed)
    margin = 3  # rows before every hot region
    stored = [h * chunk if bits[0] == 16 else 0 for h in hot]
    total = sum(stored) + margin * len(stored)
    key, value = (torch.randn(total, dim, generator=random).to(dtype) for _ in range(2))
    heads, start = [], 0
    for segment, (count, held) in enumerate(zip(items, hot, strict=True)):
        start += margin
        host = torch.randn(count, 2, chunk, dim, generator=random).to(dtype)
        parts = [part.flatten(0, 1) for part in host.unbind(1)]
        few = None if min(bits) == 16 else Residents.around(parts[0], parts[1], min(bits))
        rows = None
        if few is not None:
            rows = few.format.encode(torch.zeros(held * chunk, dim), torch.zeros(held * chunk, dim))
        coder = None if bits[1] == 16 else few
        slots = torch.randperm(count, generator=random)[:held].to(torch.int32)
        digests = torch.randn(count, max(1, chunk), dim, generator=random).to(dtype)
        head = DynamicSegment(
            segment=segment,
            index=make_index(kind, digests, codes, random, bias),
            slots=slots,
            host=host if coder is None else coder.encode_items(*host.unbind(1)),
            hot_start=start,
            chunk=chunk,
            items=count,
            hot_score=torch.rand(held, generator=random) / count if smoothing else None,
            held=None if few is None or bits[0] == 16 else replace(few, rows=rows),
            coder=coder,
            rerank=rerank,
            fresh=fresh,
        )
        heads.append(head)
        start += stored[segment]
    query = torch.randn(len(heads), group, dim, generator=random).to(dtype)
    made = Layer(key, value, heads, query)
    fill_hot(made)
    return made


def fill_hot(layer: Layer) -> None:
    """Copy into hot slots what the host holds now."""
    for head in layer.heads:
        for slot, item in enumerate(head.slots.tolist()):
            data = head.host[item : item + 1]
            own = slice(slot * head.chunk, (slot + 1) * head.chunk)
            if head.held is not None:
                told = data if head.coder else head.held.encode_items(*data.unbind(1))
                head.held.rows[own] = told[0]
                continue
            whole = head.coder.decode_items(data) if head.coder else data
            rows = slice(head.hot_start + own.start, head.hot_start + own.stop)
            layer.key[rows], layer.value[rows] = whole[0]


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


@cache
def signs(block: int) -> Tensor:
    """The Hadamard matrix of +-1: signs are parities of bits."""
    odd = [[(i & j).bit_count() % 2 for i in range(block)] for j in range(block)]
    return 1 - 2 * torch.tensor(odd).double()


def turned_exactly(part: Tensor) -> Tensor:
    """Rows times the orthogonal Hadamard matrix in float64, by the definition."""
    block = part.shape[1] & -part.shape[1]
    blocks = part.double().unflatten(1, (-1, block))
    return (blocks @ signs(block) / block**0.5).flatten(1)


def rows_exactly(held: Residents, rows: Tensor) -> Tensor:
    """Keys, then values, of rows [tokens, row_bytes] in float64: [2, tokens, dim]."""
    both = [turned_exactly(part) for part in held.format.decode(rows)]
    return torch.stack(both) + held.mean.double()[:, None]


def host_item(head: DynamicSegment, item: int) -> Tensor:
    """Keys and values [2, chunk, dim] of an item on the host, in float64."""
    data = head.host[item]
    return data.double() if head.coder is None else rows_exactly(head.coder, data)


def compared_keys(layer: Layer, head: DynamicSegment, items: Tensor) -> Tensor:
    """Keys of items of one token in float64 [items, dim]: those of slots where they are hot."""
    slot = torch.full((head.items,), -1)
    slot[head.slots.long()] = torch.arange(head.hot)
    place, data = slot[items], head.host[items]
    keys = data[:, 0, 0].double() if head.coder is None else rows_exactly(head.coder, data[:, 0])[0]
    if head.held is not None:
        keys[place >= 0] = rows_exactly(head.held, head.held.rows[place[place >= 0]])[0]
    else:
        keys[place >= 0] = layer.key[head.hot_start + place[place >= 0]].double()
    return keys


def check_rows(held: Residents, tokens: Tensor, rows: Tensor) -> None:
    """That rows [tokens, row_bytes] are those of keys and values [2, tokens, dim]: scales are the
    nearest halves, codes the nearest integers, but where rounding in float32 may decide."""
    form = held.format
    for part, mean, half in zip(tokens, held.mean, rows.chunk(2, dim=1), strict=True):
        groups = turned_exactly(part.float() - mean.float()).unflatten(1, (-1, form.group))
        most = 127 if form.bits == 8 else 7.5
        scale = half[:, form.code_bytes :].contiguous().view(torch.float16).double()
        exact = (groups.abs().amax(2) / most).clamp(min=2.0**-24)
        torch.testing.assert_close(scale, exact, rtol=2**-11 * 1.001, atol=2**-25)
        codes = half[:, : form.code_bytes].unflatten(1, (groups.shape[1], -1))
        if form.bits == 8:
            level = codes.contiguous().view(torch.int8).double()
        else:
            level = torch.cat([codes & 15, codes >> 4], dim=2).double() - 7.5
        wanted = (groups / scale[..., None]).clamp(-most, most)
        assert (level - wanted).abs().max() <= 0.5 + 1e-3


def shares_exactly(
    layer: Layer, head: DynamicSegment, query: Tensor, scaling: float, items: Tensor
) -> Tensor:
    """Shares of attention among these items by their keys in float64, as Retrieval.score says."""
    logits = query.double() @ compared_keys(layer, head, items).T * scaling
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


def check_slot(
    old: DynamicSegment, after: Layer, head: DynamicSegment, slot: int, item: int
) -> None:
    """That a hot slot holds its item as the host does, or in the fewer bits of hot slots."""
    own = slice(slot * head.chunk, (slot + 1) * head.chunk)
    if head.held is None:
        rows = slice(head.hot_start + own.start, head.hot_start + own.stop)
        got = torch.stack([after.key[rows], after.value[rows]])
        wanted, near = host_item(head, item), 0.0
        if head.coder is not None:
            near = PRECISION[got.dtype]
        torch.testing.assert_close(got.double(), wanted, rtol=near, atol=4 * near, equal_nan=True)
        return
    assert old.held is not None
    got = head.held.rows[own]
    if item == old.slots[slot]:
        assert torch.equal(got, old.held.rows[own])
    elif head.coder is not None:
        assert torch.equal(got, head.host[item])
    else:
        check_rows(head.held, head.host[item], got)


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
            check_slot(old, after, head, slot, item)
            if head.held is None:
                start = head.hot_start + slot * head.chunk
                outside[start : start + head.chunk] = False
        if head.hot_score is not None:
            assert torch.equal(head.hot_score, torch.tensor([due[item] for item in held]))
    assert torch.equal(after.key[outside], before.key[outside])
