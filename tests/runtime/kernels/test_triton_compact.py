"""Selection among candidates: the same state as by scores of all items, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hkvprof.runtime.kernels import triton_retrieval
from hkvprof.runtime.kernels.reference import TorchKernels
from tests.runtime.kernels.cases import make_layer
from tests.runtime.kernels.triton_cases import DEVICES, QUIET, moved, triton_kernels

pytestmark = [QUIET, pytest.mark.parametrize("device", DEVICES)]


@pytest.mark.parametrize(
    ("items", "hot", "options", "smoothing"),
    [
        ([170, 70], [30, 7], {"rerank": 16, "group": 2}, 0.0),
        ([131], [20], {"rerank": 5, "fresh": 2, "group": 3}, 0.7),
        ([70], [60], {"rerank": 600, "group": 1, "dtype": torch.float32, "codes": 2}, 0.9),
    ],
)
def test_steps_end_where_scores_lead(
    device: str,
    items: list[int],
    hot: list[int],
    options: dict[str, Any],
    smoothing: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of 64 items, so that there are several; slots, rows, counts, bit for bit."""
    monkeypatch.setattr(triton_retrieval, "BEST_ITEMS", 64)
    layer = make_layer(4, "projected", items, hot, smoothing=smoothing > 0, **options)
    states = [moved(layer, device) for _ in range(2)]
    dtype = layer.key.dtype
    fast, plain = (
        triton_kernels(dtype).bind(one.key, one.value, one.heads, 0.3, smoothing) for one in states
    )
    assert fast._compact is not None
    random, query = torch.Generator().manual_seed(1), layer.query.float()
    for _ in range(2):
        query = 0.8 * query + 0.6 * torch.randn(query.shape, generator=random)
        now = query.to(dtype).to(device)
        fast.step(now)
        plain.load(plain.score(now))
        for name in ("fetched", "reads", "most"):
            assert getattr(fast, name).tolist() == getattr(plain, name).tolist()
        assert torch.equal(states[0].key, states[1].key)
        assert torch.equal(states[0].value, states[1].value)
        for mine, other in zip(states[0].heads, states[1].heads, strict=True):
            assert torch.equal(mine.slots, other.slots)
            if smoothing:
                torch.testing.assert_close(mine.hot_score, other.hot_score)
    assert fast.fetched.sum() > 0


def test_ties_go_to_hot_items_then_lower_numbers(device: str) -> None:
    """All keys are the same: nothing moves; then two hot items have lost theirs."""
    layer = make_layer(4, "projected", [90], [6], rerank=8, group=2, dtype=torch.float32)
    head = layer.heads[0]
    head.host[:, 0] = 0
    head.slots.copy_(torch.tensor([40, 3, 89, 7, 21, 60]))
    rows = slice(head.hot_start, head.hot_start + 6)
    layer.key[rows] = 0
    own = moved(layer, device)
    bound = triton_kernels(torch.float32).bind(own.key, own.value, own.heads, 0.3)
    bound.step(own.query)
    assert own.heads[0].slots.tolist() == [40, 3, 89, 7, 21, 60]
    assert bound.fetched.tolist() == [0]
    layer.key[head.hot_start + 1] = layer.key[head.hot_start + 4] = -50 * layer.query[0].sum(0)
    own = moved(layer, device)
    defined = TorchKernels().bind(layer.key, layer.value, layer.heads, 0.3)
    bound = triton_kernels(torch.float32).bind(own.key, own.value, own.heads, 0.3)
    defined.step(layer.query)
    bound.step(own.query)
    assert bound.fetched.tolist() == defined.fetched.tolist() == [2]
    assert own.heads[0].slots.tolist() == head.slots.tolist()


def test_heads_that_were_not_chosen_stay(device: str) -> None:
    layer = make_layer(4, "projected", [100, 100], [9, 9], rerank=20, group=2)
    own = moved(layer, device)
    bound = triton_kernels(torch.bfloat16).bind(own.key, own.value, own.heads, 0.3)
    bound.step_some(own.query, torch.tensor([False, True], device=device))
    assert torch.equal(own.heads[0].slots.cpu(), layer.heads[0].slots)
    assert bound.reads.tolist() == [0, 20]
    assert bound.fetched[0] == 0
    assert bound.fetched[1] > 0
