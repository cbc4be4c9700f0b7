"""Steps of retrieval in Triton against the definition, state by state."""

from __future__ import annotations

import pytest
import torch

from hkvprof.runtime.kernels.reference import TorchKernels
from tests.runtime.kernels.cases import Layer, check_loaded, make_layer
from tests.runtime.kernels.test_triton_retrieve import assert_close
from tests.runtime.kernels.triton_cases import DEVICES, QUIET, moved, triton_kernels

pytestmark = [QUIET, pytest.mark.parametrize("device", DEVICES)]


@pytest.mark.parametrize(
    ("kind", "rerank", "chunk"),
    [
        ("mean", 0, 4),
        ("minmax", 0, 16),
        ("projected", 0, 1),
        ("projected", 64, 1),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.7])
def test_walks_follow_the_definition(
    device: str, kind: str, rerank: int, chunk: int, smoothing: float
) -> None:
    """Step by step: the scores are close, and the same scores lead to the same state.

    A step is score and load, also in a queue of steps.
    """
    layer = make_layer(
        3, kind, [500, 40, 170], [60, 40, 7], rerank=rerank, chunk=chunk,
        smoothing=smoothing > 0,
    )  # fmt: skip
    defined = TorchKernels().bind(layer.key, layer.value, layer.heads, 0.3, smoothing)
    parts_layer, whole_layer = moved(layer, device), moved(layer, device)
    parts, whole = (
        triton_kernels(torch.bfloat16).bind(one.key, one.value, one.heads, 0.3, smoothing)
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
                held = other.host[item]
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
    """Heads that differ in index and chunk share launches where they can."""
    kinds = [("mean", 4), ("projected", 1), ("minmax", 2), ("mean", 1)]
    heads, keys, values, queries = [], [], [], []
    rows = 0
    for number, (kind, chunk) in enumerate(kinds):
        one = make_layer(number, kind, [90 + number], [11], chunk=chunk, group=3)
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
    check_loaded(layer, moved(own, "cpu"), scores, retrieval.fetched.tolist(), 0.0)


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
    again = kernels.bind(
        own.key, own.value, own.heads, 0.3, counted=(first.fetched, first.reads, first.most)
    )
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
