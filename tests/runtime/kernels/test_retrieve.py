"""Scores, selection, loading and encoding, against definitions that share no code with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.runtime import kernels
from hkvprof.runtime.kernels import Kernels
from hkvprof.runtime.kernels.native import NativeRetrieval
from hkvprof.runtime.kernels.reference import TorchKernels, TorchRetrieval
from tests.runtime.kernels.cases import (
    DTYPES,
    KINDS,
    compiler,
    host_item,
    make_layer,
    wanted_exactly,
)

CPU = torch.device("cpu")
GROUPS = {torch.bfloat16: (1, 3, 7), torch.float16: (4, 7), torch.float32: (2, 8, 11)}


def both(dtype: torch.dtype) -> list[Kernels]:
    return [TorchKernels(), kernels.for_device(CPU, dtype)]


@compiler
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    codes=st.sampled_from([2, 4, 8]),
    dim=st.sampled_from([8, 64, 80, 128]),
    items=st.lists(st.integers(1, 1300), min_size=1, max_size=4),
    bad=st.booleans(),
    data=st.data(),
)
def test_scores(
    seed: int,
    dtype: torch.dtype,
    kind: str,
    codes: int,
    dim: int,
    items: list[int],
    bad: bool,
    data: st.DataObject,
) -> None:
    """KeyIndex.score is the definition; a NaN stays within its head."""
    group = data.draw(st.sampled_from(GROUPS[dtype]))
    layer = make_layer(
        seed, kind, items, [1] * len(items), group=group, dim=dim, codes=codes, dtype=dtype
    )
    if bad:
        layer.query[0, group // 2, 1] = torch.nan
    retrieval = kernels.for_device(CPU, dtype).bind(layer.key, layer.value, layer.heads, 0.3)
    assert isinstance(retrieval, NativeRetrieval)
    for head, score in zip(layer.heads, retrieval.score(layer.query), strict=True):
        exact = head.index.score(layer.query[head.segment], 0.3)
        torch.testing.assert_close(score, exact, rtol=2e-4, atol=1e-7, equal_nan=True)


@compiler
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(
        st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
        min_size=1,
        max_size=4,
    ),
    chunk=st.sampled_from([1, 3, 32]),
    dtype=st.sampled_from(DTYPES),
    int8=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.5, 1.0]),
    successors=st.sampled_from([0, 1, 2, 100]),
    levels=st.sampled_from([2, 5, 10**6]),
    data=st.data(),
)
def test_load(
    seed: int,
    shape: list[tuple[int, int]],
    chunk: int,
    dtype: torch.dtype,
    int8: bool,
    smoothing: float,
    successors: int,
    levels: int,
    data: st.DataObject,
) -> None:
    """Few levels make ties; NaN scores count as -1."""
    items, hot = zip(*shape, strict=True)
    layer = make_layer(
        seed, "mean", items, hot, group=GROUPS[dtype][0], chunk=chunk, dtype=dtype, int8=int8,
        smoothing=smoothing > 0,
    )  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, levels, (n,), generator=random).float() / levels for n in items]
    scores[0][data.draw(st.integers(0, items[0] - 1))] = torch.nan
    for kernel in both(dtype):
        own = layer.copy()
        retrieval = kernel.bind(own.key, own.value, own.heads, 0.1, smoothing, successors)
        assert isinstance(retrieval, TorchRetrieval if kernel.name == "torch" else NativeRetrieval)
        counts = retrieval.load(scores)
        for old, head, score, count in zip(layer.heads, own.heads, scores, counts, strict=True):
            wanted, due = wanted_exactly(old, score.tolist(), smoothing, successors)
            held = head.slots.tolist()
            assert set(held) == wanted
            kept = sum(a == b for a, b in zip(old.slots.tolist(), held, strict=True))
            assert count == len(held) - kept == len(wanted - set(old.slots.tolist()))
            for slot, item in enumerate(held):
                start = head.hot_start + slot * chunk
                both_parts = host_item(head, item, dtype)
                assert torch.equal(own.key[start : start + chunk], both_parts[0])
                assert torch.equal(own.value[start : start + chunk], both_parts[1])
            if head.hot_score is not None:
                expected = torch.tensor([due[item] for item in held])
                assert torch.equal(head.hot_score, expected)
        outside = torch.ones(len(own.key), dtype=torch.bool)
        for head in own.heads:
            outside[head.hot_start : head.hot_start + head.hot * chunk] = False
        assert torch.equal(own.key[outside], layer.key[outside])


@compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("items", [700, 20000])
def test_steps_follow_the_scores(kind: str, items: int) -> None:
    """A step is score and load, also in a queue of steps that reuse memory."""
    layer = make_layer(3, kind, [items, 40, items // 3], [items // 9, 40, 7])
    copy = layer.copy()
    kernel = kernels.for_device(CPU, torch.bfloat16)
    whole = kernel.bind(layer.key, layer.value, layer.heads, 0.3)
    parts = kernel.bind(copy.key, copy.value, copy.heads, 0.3)
    for step in range(4):
        query = torch.randn(layer.query.shape, generator=torch.Generator().manual_seed(step))
        counts = whole.step(query.bfloat16())
        assert counts == parts.load(parts.score(query.bfloat16()))
        assert counts[1] == 0
        assert counts[0] > 0
        assert torch.equal(layer.key, copy.key)
        assert torch.equal(layer.value, copy.value)


@compiler
def test_nan_queries_fetch_nothing() -> None:
    layer = make_layer(5, "projected", [500, 500], [50, 50])
    layer.query[1] = torch.nan
    for kernel in both(torch.bfloat16):
        own = layer.copy()
        counts = kernel.bind(own.key, own.value, own.heads, 0.3).step(own.query)
        assert counts[0] > 0
        assert counts[1] == 0
        assert torch.equal(own.heads[1].slots, layer.heads[1].slots)


def test_no_heads_is_no_work() -> None:
    for kernel in both(torch.bfloat16):
        empty = torch.zeros(0, 32, dtype=torch.bfloat16)
        assert kernel.bind(empty, empty, [], 0.1).load([]) == []


@compiler
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([0, 1, 255, 256, 257, 700]),
    widths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    whole=st.booleans(),
)
def test_encoding(seed: int, tokens: int, widths: list[int], whole: bool) -> None:
    """Nearest in float64; small integers make exact ties, which go to the lower number."""
    random = torch.Generator().manual_seed(seed)
    channels = sum(widths)
    if whole:
        points = torch.randint(-1, 2, (tokens, channels), generator=random).float()
        codebook = torch.randint(-1, 2, (256, channels), generator=random).float()
    else:
        points = torch.randn(tokens, channels, generator=random)
        codebook = torch.randn(256, channels, generator=random)
    points[::7] = torch.nan
    points[1::7] = torch.inf
    ends = torch.tensor(widths).cumsum(0).tolist()
    subspaces = tuple(zip([0, *ends[:-1]], ends, strict=True))
    sure = torch.nan_to_num(points, nan=0.0, posinf=0.0).double()
    for kernel in both(torch.float32):
        codes = kernel.encode(points, codebook, subspaces)
        assert codes.dtype == torch.uint8
        assert codes.shape == (tokens, len(subspaces))
        for number, (first, end) in enumerate(subspaces):
            gap = sure[:, None, first:end] - codebook[:, first:end].double()
            cost = gap.square().sum(-1) / 2
            mine = codes[:, number].long()
            if whole:
                first_best = (cost == cost.amin(1, keepdim=True)).int().argmax(1)
                assert torch.equal(mine, first_best)
            else:
                assert (cost[torch.arange(tokens), mine] <= cost.amin(1) + 1e-5).all()
