"""Scores, selection and loading in Triton, against definitions that share no code with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.profile.budgets import ANY
from tests.runtime.kernels.cases import (
    DTYPES,
    KINDS,
    Layer,
    check_loaded,
    fill_hot,
    make_layer,
    shares_exactly,
    without_hot,
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
    smoothing=st.sampled_from([0.0, 0.5, 1.0]),
    levels=st.sampled_from([2, 5, 10**6]),
    shift=st.sampled_from([0.0, -0.5]),
    fresh=st.sampled_from([1, 2, 7, ANY]),
    data=st.data(),
)
def test_load(
    device: str,
    seed: int,
    shape: list[tuple[int, int]],
    chunk: int,
    dtype: torch.dtype,
    smoothing: float,
    levels: int,
    shift: float,
    fresh: int,
    data: st.DataObject,
) -> None:
    """Few levels make ties; NaN scores count as -1, and scores may be negative."""
    items, hot = zip(*shape, strict=True)
    layer = make_layer(
        seed, "mean", items, hot, group=1, chunk=chunk, dtype=dtype,
        smoothing=smoothing > 0, fresh=fresh,
    )  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, levels, (n,), generator=random).float() / levels for n in items]
    scores = [score + shift for score in scores]
    scores[0][data.draw(st.integers(0, items[0] - 1))] = torch.nan
    own = moved(layer, device)
    retrieval = triton_kernels(dtype).bind(own.key, own.value, own.heads, 0.1, smoothing)
    retrieval.load([score.to(device) for score in scores])
    counts = retrieval.fetched.tolist()
    assert retrieval.most.tolist() == counts
    check_loaded(layer, moved(own, "cpu"), scores, counts, smoothing)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["mean", "projected"]),
    dim=st.sampled_from([8, 80, 128]),
    items=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    share=st.sampled_from([0.01, 0.4, 1.0]),
    rerank=st.sampled_from([1, 30, 600]),
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
    group: int,
    bad: str,
) -> None:
    """Which of nearly equal estimates are picked is open; NaN and infinity stay within head 0.

    Keys that are hot are not read from the host, where they are something else here.
    """
    hot = [max(1, int(share * n)) for n in items]
    layer = make_layer(seed, kind, items, hot, group=group, dim=dim, dtype=dtype, rerank=rerank)
    spoiled = layer.heads[0].host
    if bad == "query":
        layer.query[0, group // 2, 1] = torch.nan
    elif bad == "head":
        spoiled[:] = torch.nan
    elif bad == "keys":
        spoiled[::3, 0, ..., 1] = torch.nan
        spoiled[1::5, 0, ..., 2] = torch.inf
    fill_hot(layer)
    lost = [without_hot(head) for head in layer.heads]
    own = moved(Layer(layer.key, layer.value, lost, layer.query), device)
    retrieval = triton_kernels(dtype).bind(own.key, own.value, own.heads, 0.3)
    scores = zip(layer.heads, retrieval.score(own.query), strict=True)
    for number, (head, score) in enumerate(scores):
        score = score.cpu()
        query = layer.query[head.segment]
        estimate = head.index.score(query, 0.3)
        if head.hot == head.items:
            assert_close(score, estimate)
            assert retrieval.reads[number] == 0
            continue
        picked = (score != -1).nonzero()[:, 0]
        assert len(picked) == min(head.hot + rerank, head.items)
        exact = shares_exactly(layer, head, query, 0.3, picked)
        torch.testing.assert_close(
            score[picked].double(), exact, rtol=1e-3, atol=1e-7, equal_nan=True
        )
        assert set(head.slots.tolist()) <= set(picked.tolist())
        assert retrieval.reads[number] == len(picked) - head.hot
        others, more = estimate[score == -1], set(picked.tolist()) - set(head.slots.tolist())
        if len(others) and not estimate.isnan().any():
            assert estimate[list(more)].min() >= others.max() * (1 - 1e-3)


def test_all_that_is_not_picked_scores_minus_one(device: str) -> None:
    """Also behind the last full block of items."""
    items = [257, 270, 33]
    layer = make_layer(4, "mean", items, [1] * 3, dim=256, dtype=torch.float32, rerank=1)
    own = moved(layer, device)
    retrieval = triton_kernels(torch.float32).bind(own.key, own.value, own.heads, 0.3)
    for score, count in zip(retrieval.score(own.query), items, strict=True):
        assert len(score) == count
        assert (score != -1).sum() == 2
