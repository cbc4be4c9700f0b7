"""Scores, selection and loading in Triton, against definitions that share no code with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.runtime.kernels.reference import TorchKernels
from tests.runtime.kernels.cases import (
    DTYPES,
    KINDS,
    Layer,
    check_loaded,
    host_item,
    make_layer,
    shares_exactly,
)
from tests.runtime.kernels.triton_cases import DEVICES, QUIET, moved, triton_kernels

pytestmark = [QUIET, pytest.mark.parametrize("device", DEVICES)]
GROUPS = st.integers(1, 8)


def assert_close(score: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(score.cpu(), exact, rtol=2e-4, atol=1e-7, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    codes=st.sampled_from([2, 4, 8]),
    dim=st.sampled_from([8, 64, 80, 96, 128, 256]),
    items=st.lists(
        st.sampled_from([1, 2, 257, 521]) | st.integers(1, 1300), min_size=1, max_size=3
    ),
    group=GROUPS,
    bad=st.booleans(),
)
def test_scores(
    device: str,
    seed: int,
    dtype: torch.dtype,
    kind: str,
    codes: int,
    dim: int,
    items: list[int],
    group: int,
    bad: bool,
) -> None:
    """KeyIndex.score is the definition, in float64 here; a NaN stays within its head."""
    layer = make_layer(
        seed, kind, items, [1] * len(items), group=group, dim=dim, codes=codes, dtype=dtype
    )
    if bad:
        layer.query[0, group // 2, 1] = torch.nan
    own = moved(layer, device)
    retrieval = triton_kernels(dtype).bind(own.key, own.value, own.heads, 0.3)
    for head, score in zip(layer.heads, retrieval.score(own.query), strict=True):
        assert_close(score, scores_exactly(layer, head.segment))


def scores_exactly(layer: Layer, number: int) -> torch.Tensor:
    """Softmax per query head over the items, mean over the group, in float64."""
    index, query = layer.heads[number].index, layer.query[number].double()
    if hasattr(index, "mean"):
        logits = query @ index.mean.double().T
    elif hasattr(index, "low"):
        low, high = index.low.double(), index.high.double()
        logits = torch.maximum(query[:, None] * low, query[:, None] * high).sum(-1)
    else:
        tables = index.tables
        projected = query @ tables.query_projection.double()
        keys = torch.zeros(index.items, projected.shape[1], dtype=torch.float64)
        for code, (first, end) in enumerate(tables.subspaces):
            centroids = tables.codebook[:, first:end].double()
            keys[:, first:end] = centroids[index.codes[:, code].long()]
        logits = projected @ keys.T
    return (logits * 0.3).softmax(-1).mean(0).float()


@settings(max_examples=35, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(
        st.integers(1, 150).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
        min_size=1,
        max_size=4,
    ),
    chunk=st.sampled_from([1, 3, 32]),
    dtype=st.sampled_from(DTYPES),
    int8=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.5, 1.0]),
    successors=st.sampled_from([0, 1, 2, 100]),
    levels=st.sampled_from([2, 5, 10**6]),
    shift=st.sampled_from([0.0, -0.5]),
    data=st.data(),
)
def test_load(
    device: str,
    seed: int,
    shape: list[tuple[int, int]],
    chunk: int,
    dtype: torch.dtype,
    int8: bool,
    smoothing: float,
    successors: int,
    levels: int,
    shift: float,
    data: st.DataObject,
) -> None:
    """Few levels make ties; NaN scores count as -1, and scores may be negative."""
    items, hot = zip(*shape, strict=True)
    layer = make_layer(
        seed, "mean", items, hot, group=1, chunk=chunk, dtype=dtype, int8=int8,
        smoothing=smoothing > 0,
    )  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, levels, (n,), generator=random).float() / levels for n in items]
    scores = [score + shift for score in scores]
    scores[0][data.draw(st.integers(0, items[0] - 1))] = torch.nan
    own = moved(layer, device)
    retrieval = triton_kernels(dtype).bind(
        own.key, own.value, own.heads, 0.1, smoothing, successors
    )
    retrieval.load([score.to(device) for score in scores])
    counts = retrieval.fetched.tolist()
    check_loaded(layer, moved(own, "cpu"), scores, counts, smoothing, successors)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["mean", "projected"]),
    dim=st.sampled_from([8, 80, 128]),
    items=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    share=st.sampled_from([0.01, 0.4, 1.0]),
    rerank=st.sampled_from([1, 30, 600]),
    int8=st.booleans(),
    group=GROUPS,
    bad=st.sampled_from(["", "keys", "head", "query"]),
)
def test_reranked_scores(
    device: str,
    seed: int,
    dtype: torch.dtype,
    kind: str,
    dim: int,
    items: list[int],
    share: float,
    rerank: int,
    int8: bool,
    group: int,
    bad: str,
) -> None:
    """Which of nearly equal estimates are picked is open; NaN and infinity stay within head 0."""
    hot = [max(1, int(share * n)) for n in items]
    layer = make_layer(
        seed, kind, items, hot, group=group, dim=dim, dtype=dtype, int8=int8, rerank=rerank
    )
    spoiled = layer.heads[0].host if layer.heads[0].scale is None else layer.heads[0].scale
    if bad == "query":
        layer.query[0, group // 2, 1] = torch.nan
    elif bad == "head":
        spoiled[:] = torch.nan
    elif bad == "keys":
        spoiled[::3, 0, ..., 1] = torch.nan
        spoiled[1::5, 0, ..., 2] = torch.inf
    own = moved(layer, device)
    retrieval = triton_kernels(dtype).bind(own.key, own.value, own.heads, 0.3)
    for head, score in zip(layer.heads, retrieval.score(own.query), strict=True):
        score = score.cpu()
        query = layer.query[head.segment]
        estimate = head.index.score(query, 0.3)
        if head.hot == head.items:
            assert_close(score, estimate)
            continue
        picked = (score != -1).nonzero()[:, 0]
        assert len(picked) == min(head.hot + rerank, head.items)
        exact = shares_exactly(head, query, 0.3, picked.tolist())
        torch.testing.assert_close(
            score[picked].double(), exact, rtol=1e-3, atol=1e-7, equal_nan=True
        )
        others = estimate[score == -1]
        if len(others) and not estimate.isnan().any():
            assert estimate[picked].min() >= others.max() * (1 - 1e-3)


def test_all_that_is_not_picked_scores_minus_one(device: str) -> None:
    """Also behind the last full block of items."""
    items = [257, 270, 33]
    layer = make_layer(4, "mean", items, [1] * 3, dim=256, dtype=torch.float32, rerank=1)
    own = moved(layer, device)
    retrieval = triton_kernels(torch.float32).bind(own.key, own.value, own.heads, 0.3)
    for score, count in zip(retrieval.score(own.query), items, strict=True):
        assert len(score) == count
        assert (score != -1).sum() == 2


@pytest.mark.parametrize(
    ("kind", "rerank", "chunk", "int8"),
    [
        ("mean", 0, 4, False),
        ("minmax", 0, 16, True),
        ("projected", 0, 1, True),
        ("projected", 64, 1, False),
    ],
)
@pytest.mark.parametrize(("smoothing", "successors"), [(0.0, 0), (0.7, 2)])
def test_walks_follow_the_definition(
    device: str, kind: str, rerank: int, chunk: int, int8: bool, smoothing: float, successors: int
) -> None:
    """Step by step: the scores are close, and the same scores lead to the same state.

    A step is score and load, also in a queue of steps.
    """
    layer = make_layer(
        3, kind, [500, 40, 170], [60, 40, 7], rerank=rerank, chunk=chunk, int8=int8,
        smoothing=smoothing > 0,
    )  # fmt: skip
    defined = TorchKernels().bind(layer.key, layer.value, layer.heads, 0.3, smoothing, successors)
    parts_layer, whole_layer = moved(layer, device), moved(layer, device)
    parts, whole = (
        triton_kernels(torch.bfloat16).bind(
            one.key, one.value, one.heads, 0.3, smoothing, successors
        )
        for one in (parts_layer, whole_layer)
    )
    random = torch.Generator().manual_seed(1)
    query = layer.query.float()
    for _ in range(3):
        query = 0.8 * query + 0.6 * torch.randn(query.shape, generator=random)
        now = query.bfloat16()
        scores = parts.score(now.to(device))
        for score, exact in zip(scores, defined.score(now), strict=True):
            # Nearly equal estimates may be picked for reranking by one and not by the other.
            same = (score.cpu() == -1) == (exact == -1)
            assert same.float().mean() > 0.99
            assert_close(score.cpu()[same], exact[same])
        parts.load(scores)
        whole.step(now.to(device))
        defined.load([score.cpu() for score in scores])
        assert parts.fetched.tolist() == whole.fetched.tolist() == defined.fetched.tolist()
        assert parts.fetched[1] == 0
        assert torch.equal(parts_layer.key, whole_layer.key)
        assert torch.equal(parts_layer.value, whole_layer.value)
        for mine, other in zip(parts_layer.heads, layer.heads, strict=True):
            state = {s: i for i, s in enumerate(mine.slots.tolist())}
            assert set(state) == set(other.slots.tolist())
            for slot, item in enumerate(other.slots.tolist()):
                start = mine.hot_start + state[item] * chunk
                held = host_item(other, item, torch.bfloat16)
                assert torch.equal(parts_layer.key[start : start + chunk].cpu(), held[0])
                assert torch.equal(parts_layer.value[start : start + chunk].cpu(), held[1])
                if smoothing:
                    assert mine.hot_score[state[item]].cpu() == other.hot_score[slot]


@pytest.mark.parametrize("rerank", [0, 99])
def test_nan_queries_fetch_nothing(device: str, rerank: int) -> None:
    layer = make_layer(5, "projected", [300, 300], [50, 50], rerank=rerank)
    layer.query[1] = torch.nan
    own = moved(layer, device)
    retrieval = triton_kernels(torch.bfloat16).bind(own.key, own.value, own.heads, 0.3)
    retrieval.step(own.query)
    assert retrieval.fetched[0] > 0
    assert retrieval.fetched[1] == 0
    assert torch.equal(own.heads[1].slots.cpu(), layer.heads[1].slots)


def test_heads_of_all_kinds_in_one_layer(device: str) -> None:
    """Heads that differ in index, chunk and type of host items share launches where they can."""
    kinds = [("mean", 4, False), ("projected", 1, True), ("minmax", 2, False), ("mean", 1, True)]
    heads, keys, values, queries = [], [], [], []
    rows = 0
    for number, (kind, chunk, int8) in enumerate(kinds):
        one = make_layer(number, kind, [90 + number], [11], chunk=chunk, int8=int8, group=3)
        head = one.heads[0]
        heads.append(type(head)(**{**vars(head), "segment": number, "hot_start": rows + 3}))
        rows += len(one.key)
        keys.append(one.key)
        values.append(one.value)
        queries.append(one.query)
    layer = Layer(torch.cat(keys), torch.cat(values), heads, torch.cat(queries))
    own = moved(layer, device)
    retrieval = triton_kernels(torch.bfloat16).bind(own.key, own.value, own.heads, 0.3)
    scores = [score.cpu() for score in retrieval.score(own.query)]
    for head, score in zip(layer.heads, scores, strict=True):
        assert_close(score, head.index.score(layer.query[head.segment], 0.3))
    retrieval.step(own.query)
    check_loaded(layer, moved(own, "cpu"), scores, retrieval.fetched.tolist(), 0.0, 0)


def test_no_heads_is_no_work_and_counting_goes_on(device: str) -> None:
    kernels = triton_kernels(torch.bfloat16)
    empty = torch.zeros(0, 32, dtype=torch.bfloat16, device=device)
    retrieval = kernels.bind(empty, empty, [], 0.1)
    retrieval.load([])
    assert retrieval.fetched.shape == (0,)
    own = moved(make_layer(7, "mean", [90, 40], [9, 40]), device)
    first = kernels.bind(own.key, own.value, own.heads, 0.3)
    first.step(own.query)
    count = int(first.fetched[0])
    again = kernels.bind(own.key, own.value, own.heads, 0.3, fetched=first.fetched)
    again.step(-own.query)
    assert again.fetched is first.fetched
    assert count < again.fetched[0] <= count + 9


def test_indexes_that_are_not_known_go_to_torch_and_are_noted(device: str) -> None:
    layer = make_layer(1, "mean", [30], [3], dtype=torch.float32)
    index = layer.heads[0].index
    kernels = triton_kernels(torch.float32)
    other = type(index)(index.mean.half())
    head = type(layer.heads[0])(**{**vars(layer.heads[0]), "index": other})
    own = moved(Layer(layer.key, layer.value, [head], layer.query), device)
    kernels.bind(own.key, own.value, own.heads, 0.3).step(own.query)
    assert list(kernels.notes) == ["torch for digests of another type"]
