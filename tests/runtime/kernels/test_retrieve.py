"""Scores, selection and loading, against definitions that share no code with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.profile.budgets import ANY
from hkvprof.runtime import kernels
from hkvprof.runtime.kernels import Kernels
from hkvprof.runtime.kernels.native import NativeRetrieval
from hkvprof.runtime.kernels.reference import TorchKernels, TorchRetrieval
from tests.runtime.kernels.cases import (
    BITS,
    DTYPES,
    KINDS,
    PRECISION,
    Layer,
    check_loaded,
    compiler,
    fill_hot,
    make_layer,
    shares_exactly,
    without_hot,
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
    bits=st.sampled_from(BITS),
    smoothing=st.sampled_from([0.0, 0.5, 1.0]),
    levels=st.sampled_from([2, 5, 10**6]),
    fresh=st.sampled_from([1, 2, 7, ANY]),
    data=st.data(),
)
def test_load(
    seed: int,
    shape: list[tuple[int, int]],
    chunk: int,
    dtype: torch.dtype,
    bits: tuple[int, int],
    smoothing: float,
    levels: int,
    fresh: int,
    data: st.DataObject,
) -> None:
    """Few levels make ties; NaN scores count as -1; no more become hot than may."""
    items, hot = zip(*shape, strict=True)
    layer = make_layer(
        seed, "mean", items, hot, group=GROUPS[dtype][0], chunk=chunk, dtype=dtype, bits=bits,
        smoothing=smoothing > 0, fresh=fresh,
    )  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, levels, (n,), generator=random).float() / levels for n in items]
    scores[0][data.draw(st.integers(0, items[0] - 1))] = torch.nan
    for kernel in both(dtype):
        own = layer.copy()
        retrieval = kernel.bind(own.key, own.value, own.heads, 0.1, smoothing)
        assert isinstance(retrieval, TorchRetrieval if kernel.name == "torch" else NativeRetrieval)
        retrieval.load(scores)
        check_loaded(layer, own, scores, retrieval.fetched.tolist(), smoothing)
        assert torch.equal(retrieval.most, retrieval.fetched)


@compiler
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["mean", "projected"]),
    dim=st.sampled_from([8, 80, 128]),
    items=st.lists(st.integers(1, 1500) | st.just(9000), min_size=1, max_size=3),
    share=st.sampled_from([0.01, 0.1, 0.4, 1.0]),
    rerank=st.sampled_from([1, 30, 600, 4096]),
    bits=st.sampled_from(BITS),
    bad=st.sampled_from(["", "keys", "head", "query"]),
    data=st.data(),
)
def test_reranked_scores(
    seed: int,
    dtype: torch.dtype,
    kind: str,
    dim: int,
    items: list[int],
    share: float,
    rerank: int,
    bits: tuple[int, int],
    bad: str,
    data: st.DataObject,
) -> None:
    """Which of nearly equal estimates are picked is open; NaN and infinity stay within head 0.

    Keys that are hot are not read from the host, where they are something else here.
    """
    group = data.draw(st.sampled_from(GROUPS[dtype]))
    hot = [max(1, int(share * n)) for n in items]
    layer = make_layer(
        seed, kind, items, hot, group=group, dim=dim, dtype=dtype, bits=bits, rerank=rerank
    )
    spoiled = layer.heads[0].host
    if bad == "query":
        layer.query[0, group // 2, 1] = torch.nan
    elif bits[1] != 16:  # bytes hold no NaN
        pass
    elif bad == "head":
        spoiled[:] = torch.nan
    elif bad == "keys":
        spoiled[::3, 0, ..., 1] = torch.nan
        if bits[0] == 16:  # rows of 8 bits hold a large number in its place
            spoiled[1::5, 0, ..., 2] = torch.inf
    fill_hot(layer)
    told = [without_hot(head) for head in layer.heads]
    for kernel in both(dtype):
        retrieval = kernel.bind(layer.key, layer.value, told, 0.3)
        assert isinstance(retrieval, TorchRetrieval if kernel.name == "torch" else NativeRetrieval)
        scores = zip(layer.heads, retrieval.score(layer.query), strict=True)
        for number, (head, score) in enumerate(scores):
            query = layer.query[head.segment]
            estimate = head.index.score(query, 0.3)
            if head.hot == head.items:
                assert retrieval.reads[number] == 0
                torch.testing.assert_close(score, estimate, rtol=2e-4, atol=1e-7, equal_nan=True)
                continue
            picked = (score != -1).nonzero()[:, 0]
            assert len(picked) == min(head.hot + rerank, head.items)
            cold = set(picked.tolist()) - set(head.slots.tolist())
            assert retrieval.reads[number] == len(cold)
            exact = shares_exactly(layer, head, query, 0.3, picked)
            # The definition compares keys in fewer bits as it attends to them: rounded to `dtype`.
            rounded = kernel.name == "torch" and min(bits) < 16
            near = max(1e-3, 16 * PRECISION[dtype]) if rounded else 1e-3
            torch.testing.assert_close(
                score[picked].double(), exact, rtol=near, atol=1e-7, equal_nan=True
            )
            assert set(head.slots.tolist()) <= set(picked.tolist())
            others, more = estimate[score == -1], set(picked.tolist()) - set(head.slots.tolist())
            if len(others) and not estimate.isnan().any():
                assert estimate[list(more)].min() >= others.max() * (1 - 1e-3)


@compiler
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    items=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    rerank=st.sampled_from([1, 40]),
    bits=st.sampled_from(BITS),
    smoothing=st.sampled_from([0.0, 0.9]),
)
def test_reranked_steps(
    seed: int,
    dtype: torch.dtype,
    items: list[int],
    rerank: int,
    bits: tuple[int, int],
    smoothing: float,
) -> None:
    """Smoothing works on the exact scores."""
    hot = [1 + n // 8 for n in items]
    layer = make_layer(
        seed, "projected", items, hot, group=GROUPS[dtype][-1], dtype=dtype, bits=bits,
        smoothing=smoothing > 0, rerank=rerank,
    )  # fmt: skip
    for kernel in both(dtype):
        own = layer.copy()
        retrieval = kernel.bind(own.key, own.value, own.heads, 0.3, smoothing)
        scores = retrieval.score(own.query)
        retrieval.step(own.query)
        check_loaded(layer, own, scores, retrieval.fetched.tolist(), smoothing)


@compiler
@pytest.mark.parametrize("bits", BITS[1:])
@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("dim", [24, 64])
def test_items_in_fewer_bits_are_chosen_and_held_as_defined(
    dim: int, chunk: int, bits: tuple[int, int]
) -> None:
    """The same slots and counts; rows of the same bytes but where float32 rounds otherwise."""
    layer = make_layer(
        9, "projected", [600, 40], [60, 40], group=2, dim=dim, dtype=torch.float32, bits=bits,
        chunk=chunk, rerank=80 if chunk == 1 else 0, smoothing=True,
    )  # fmt: skip
    layer.heads[0].host[5] = layer.heads[0].host[7]
    bound = []
    for kernel in both(torch.float32):
        own = layer.copy()
        bound.append((own, kernel.bind(own.key, own.value, own.heads, 0.3, 0.5)))
    assert isinstance(bound[1][1], NativeRetrieval)
    for step in range(4):
        query = torch.randn(layer.query.shape, generator=torch.Generator().manual_seed(step))
        for _, retrieval in bound:
            retrieval.step(query)
        (defined, first), (own, second) = bound
        for name in ("fetched", "reads", "most"):
            assert torch.equal(getattr(first, name), getattr(second, name))
        for one, other in zip(defined.heads, own.heads, strict=True):
            assert torch.equal(one.slots, other.slots)
            if one.held is not None and other.held is not None:
                assert (one.held.rows == other.held.rows).float().mean() > 0.999
        torch.testing.assert_close(defined.key, own.key, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(defined.value, own.value, rtol=1e-5, atol=1e-5)
    assert bound[0][1].fetched[0] > 60


@compiler
@pytest.mark.parametrize("bits", [8, 4])
def test_items_that_are_not_finite_are_quantised_as_defined(bits: int) -> None:
    layer = make_layer(2, "mean", [60], [6], group=2, dtype=torch.float32, bits=(bits, 16))
    head = layer.heads[0]
    assert head.held is not None
    free = sorted(set(range(60)) - set(head.slots.tolist()))
    head.host[free[0], 0, 0, 3] = torch.nan
    head.host[free[1], 1, 0, 4] = torch.inf
    head.host[free[2], 0, 0, 5] = -torch.inf
    head.host[free[3], :, 0] = head.held.mean  # nothing but the mean
    head.host[free[4], :, 0] *= 1e7
    scores = torch.zeros(60)
    scores[free[:6]] = 1
    found = []
    for kernel in both(torch.float32):
        own = layer.copy()
        kernel.bind(own.key, own.value, own.heads, 0.3).load([scores])
        assert own.heads[0].held is not None
        assert sorted(own.heads[0].slots.tolist()) == free[:6]
        found.append(own.heads[0].held.rows)
    assert torch.equal(*found)


@compiler
@pytest.mark.parametrize(("kind", "rerank"), [*((kind, 0) for kind in KINDS), ("projected", 64)])
@pytest.mark.parametrize("items", [700, 20000])
def test_steps_follow_the_scores(kind: str, rerank: int, items: int) -> None:
    """A step is score and load, also in a queue of steps that reuse memory."""
    layer = make_layer(3, kind, [items, 40, items // 3], [items // 9, 40, 7], rerank=rerank)
    copy = layer.copy()
    kernel = kernels.for_device(CPU, torch.bfloat16)
    whole = kernel.bind(layer.key, layer.value, layer.heads, 0.3)
    parts = kernel.bind(copy.key, copy.value, copy.heads, 0.3)
    for step in range(4):
        query = torch.randn(layer.query.shape, generator=torch.Generator().manual_seed(step))
        before = whole.fetched.tolist()
        whole.step(query.bfloat16())
        parts.load(parts.score(query.bfloat16()))
        assert torch.equal(whole.fetched, parts.fetched)
        assert whole.fetched[1] == 0
        assert whole.fetched[0] > before[0]
        assert torch.equal(layer.key, copy.key)
        assert torch.equal(layer.value, copy.value)


@compiler
@pytest.mark.parametrize("rerank", [0, 99])
def test_nan_queries_fetch_nothing(rerank: int) -> None:
    layer = make_layer(5, "projected", [500, 500], [50, 50], rerank=rerank)
    layer.query[1] = torch.nan
    for kernel in both(torch.bfloat16):
        own = layer.copy()
        retrieval = kernel.bind(own.key, own.value, own.heads, 0.3)
        retrieval.step(own.query)
        assert retrieval.fetched[0] > 0
        assert retrieval.fetched[1] == 0
        assert torch.equal(own.heads[1].slots, layer.heads[1].slots)


@compiler
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_what_may_not_come_at_once_comes_later(smoothing: float) -> None:
    """The same scores again and again: best first, until the best are there."""
    layer = make_layer(11, "mean", [400], [40], fresh=6, smoothing=smoothing > 0)
    scores = [torch.rand(400, generator=torch.Generator().manual_seed(1)) + 1]
    wanted = set(scores[0].topk(40).indices.tolist())
    for kernel in both(torch.bfloat16):
        own = layer.copy()
        retrieval = kernel.bind(own.key, own.value, own.heads, 0.3, smoothing)
        missing = len(wanted - set(layer.heads[0].slots.tolist()))
        for step in range(1, 8):
            retrieval.load(scores)
            assert retrieval.fetched[0] == min(6 * step, missing)
            assert retrieval.most[0] == 6
        assert set(own.heads[0].slots.tolist()) == wanted


def test_no_heads_is_no_work() -> None:
    for kernel in both(torch.bfloat16):
        empty = torch.zeros(0, 32, dtype=torch.bfloat16)
        retrieval = kernel.bind(empty, empty, [], 0.1)
        retrieval.load([])
        assert retrieval.fetched.shape == (0,)


def test_counting_goes_on_after_binding_again() -> None:
    for kernel in both(torch.bfloat16):
        own = make_layer(7, "mean", [90, 40], [9, 40])
        first = kernel.bind(own.key, own.value, own.heads, 0.3)
        first.step(own.query)
        count = int(first.fetched[0])
        again = kernel.bind(
            own.key, own.value, own.heads, 0.3, counted=(first.fetched, first.reads, first.most)
        )
        again.step(-own.query)
        assert again.fetched is first.fetched
        assert count < again.fetched[0] <= count + 9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rerank", [0, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.6])
def test_hidden_items_are_as_if_they_were_not_there(
    kind: str, rerank: int, smoothing: float
) -> None:
    """Selection among the visible items equals that of a layer which has only those; candidates are
    the visible ones that were hot, and the best of the rest."""
    items, hot, dim = 60, 8, 32
    layer = make_layer(
        3, kind, [items], [hot], group=2, dim=dim, dtype=torch.float32, rerank=rerank,
        smoothing=bool(smoothing),
    )  # fmt: skip
    hidden = torch.rand(items, generator=torch.Generator().manual_seed(1)) < 0.5
    shown = (~hidden).nonzero()[:, 0]
    before = layer.heads[0].slots.long()
    before = before[~hidden[before]]
    assert 0 < len(before) < hot

    def bound(one: Any) -> TorchRetrieval:
        return TorchKernels().bind(one.key, one.value, one.heads, 0.3, smoothing)

    plain, same = layer.copy(), layer.copy()
    bound(plain).step(plain.query)
    bound(same).step_seeing(same.query, [torch.zeros_like(hidden)])
    assert torch.equal(plain.heads[0].slots, same.heads[0].slots)
    assert torch.equal(plain.key, same.key)
    masked = layer.copy()
    retrieval = bound(masked)
    head = masked.heads[0]
    retrieval.step_seeing(masked.query, [hidden])
    if not smoothing:
        small = replace(
            head,
            index=replace(
                head.index,
                **{
                    name: getattr(head.index, name)[shown]
                    for name in ("mean", "low", "high", "codes")
                    if hasattr(head.index, name)
                },
            ),
            slots=torch.searchsorted(shown, before).int(),
            host=head.host[shown],
            items=len(shown),
        )
        key, rows = layer.key.clone(), slice(head.hot_start, head.hot_start + len(before))
        key[rows] = head.host[before, 0, 0]
        expected = bound(Layer(key, masked.value, [small], layer.query)).score(layer.query)
        best = {int(shown[i]) for i in expected[0].topk(hot).indices}
        assert {int(i) for i in head.slots} == best
    assert not hidden[head.slots.long()].any()
    for slot, item in enumerate(head.slots.tolist()):
        row = head.hot_start + slot
        assert torch.equal(masked.key[row], head.host[item, 0, 0])
        assert torch.equal(masked.value[row], head.host[item, 1, 0])
    retrieval.step_seeing(masked.query, [torch.ones_like(hidden)])  # nothing is there: any will do
    assert bool(((head.slots >= 0) & (head.slots < items)).all())
