"""Hot slots and host items in fewer bits in Triton: scores, selection and loading by definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.runtime.kernels.reference import TorchKernels
from tests.runtime.kernels.cases import (
    BITS,
    DTYPES,
    Layer,
    check_loaded,
    fill_hot,
    make_layer,
    shares_exactly,
    without_hot,
)
from tests.runtime.kernels.triton_cases import DEVICES, QUIET, moved, triton_kernels

pytestmark = [QUIET, pytest.mark.parametrize("device", DEVICES)]
FEWER = BITS[1:]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(
        st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
        min_size=1,
        max_size=3,
    ),
    chunk=st.sampled_from([1, 3, 16]),
    dim=st.sampled_from([8, 24, 64, 80]),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from(FEWER),
    smoothing=st.sampled_from([0.0, 0.5]),
)
def test_load(
    device: str,
    seed: int,
    shape: list[tuple[int, int]],
    chunk: int,
    dim: int,
    dtype: torch.dtype,
    bits: tuple[int, int],
    smoothing: float,
) -> None:
    items, hot = zip(*shape, strict=True)
    layer = make_layer(
        seed, "mean", items, hot, group=1, chunk=chunk, dim=dim, dtype=dtype, bits=bits,
        smoothing=smoothing > 0,
    )  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=random) for n in items]
    own, kernels = moved(layer, device), triton_kernels(dtype)
    retrieval = kernels.bind(own.key, own.value, own.heads, 0.1, smoothing)
    assert not kernels.notes
    retrieval.load([score.to(device) for score in scores])
    check_loaded(layer, moved(own, "cpu"), scores, retrieval.fetched.tolist(), smoothing)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    dim=st.sampled_from([8, 64, 80]),
    items=st.lists(st.integers(2, 150), min_size=1, max_size=2),
    rerank=st.sampled_from([1, 30]),
    group=st.integers(1, 8),
    bits=st.sampled_from(FEWER),
)
def test_reranked_scores(
    device: str,
    seed: int,
    dtype: torch.dtype,
    dim: int,
    items: list[int],
    rerank: int,
    group: int,
    bits: tuple[int, int],
) -> None:
    """Hot keys are read from their slots alone."""
    hot = [max(1, n // 3) for n in items]
    layer = make_layer(
        seed, "projected", items, hot, group=group, dim=dim, dtype=dtype, rerank=rerank, bits=bits
    )
    fill_hot(layer)
    lost = [without_hot(head) for head in layer.heads]
    own, kernels = (
        moved(Layer(layer.key, layer.value, lost, layer.query), device),
        triton_kernels(dtype),
    )
    retrieval = kernels.bind(own.key, own.value, own.heads, 0.3)
    assert not kernels.notes
    for head, score in zip(layer.heads, retrieval.score(own.query), strict=True):
        picked = (score.cpu() != -1).nonzero()[:, 0]
        assert len(picked) == min(head.hot + rerank, head.items)
        exact = shares_exactly(layer, head, layer.query[head.segment], 0.3, picked)
        near = 1e-3 if dtype == torch.float32 else 0.02  # queries are rounded to float16
        torch.testing.assert_close(score.cpu()[picked].double(), exact, rtol=near, atol=1e-7)


@pytest.mark.parametrize("bits", FEWER)
@pytest.mark.parametrize("chunk", [1, 5])
def test_steps_lead_where_the_definition_does(
    device: str, chunk: int, bits: tuple[int, int]
) -> None:
    """The same slots and counts; rows of the same bytes but where float32 rounds otherwise."""
    layer = make_layer(
        9, "projected", [100, 12], [30, 12], group=2, dim=24, dtype=torch.float32, bits=bits,
        chunk=chunk, rerank=20 if chunk == 1 else 0, smoothing=True,
    )  # fmt: skip
    own, kernels = moved(layer, device), triton_kernels(torch.float32)
    defined = TorchKernels().bind(layer.key, layer.value, layer.heads, 0.3, 0.5)
    retrieval = kernels.bind(own.key, own.value, own.heads, 0.3, 0.5)
    assert not kernels.notes
    for step in range(2):
        query = torch.randn(layer.query.shape, generator=torch.Generator().manual_seed(step))
        defined.step(query)
        retrieval.step(query.to(device))
        for name in ("fetched", "reads", "most"):
            assert torch.equal(getattr(defined, name), getattr(retrieval, name).cpu())
        after = moved(own, "cpu")
        for one, other in zip(layer.heads, after.heads, strict=True):
            assert torch.equal(one.slots, other.slots)
            if one.held is not None and other.held is not None:
                assert (one.held.rows == other.held.rows).float().mean() > 0.999
        torch.testing.assert_close(layer.key, after.key, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.value, after.value, rtol=1e-5, atol=1e-5)
    assert defined.fetched[0] > 0
