"""With prefetch, attention sees the last step's selection or, where a query turned, this one's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import UsageError
from hkvprof.models.calls import with_cache
from hkvprof.runtime import handle as handles
from hkvprof.runtime import retrieval as prefetch
from hkvprof.runtime import retrieval as retrieving
from hkvprof.runtime.kernels import Kernels
from hkvprof.runtime.kernels.reference import TorchKernels
from hkvprof.runtime.options import Options
from hkvprof.runtime.retrieval import Prefetch, Queues
from tests.models_for_tests import apply, random_llama, token_ids
from tests.runtime.kernels.cases import Layer, make_layer
from tests.runtime.kernels.triton_cases import DEVICES, QUIET, moved, triton_kernels
from tests.runtime.queues import InOrder, Late

QUEUES = pytest.mark.parametrize("queues", [InOrder, Late])


def state(layer: Layer) -> tuple[Tensor, ...]:
    """Copies of all that a selection changes."""
    slots = [head.slots.clone().cpu() for head in layer.heads]
    scores = [head.hot_score.clone().cpu() for head in layer.heads if head.hot_score is not None]
    return (layer.key.clone().cpu(), layer.value.clone().cpu(), *slots, *scores)


def walk(layer: Layer, steps: int) -> list[Tensor]:
    """Queries that turn slowly; in step 2 that of head 1 turns around, in step 4 all do."""
    random = torch.Generator().manual_seed(3)
    query, out = layer.query.float(), []
    for step in range(steps):
        query = 0.97 * query + 0.24 * torch.randn(query.shape, generator=random)
        if step == 2:
            query[1] = torch.randn(query[1].shape, generator=random)
        if step == 4:
            query = torch.randn(query.shape, generator=random)
        out.append(query.to(layer.query.dtype))
    return out


def check_walk(kernels: Kernels, device: str, queues: Queues, items: list[int]) -> None:
    """Against every head's states in plain steps: the brute-force definition."""
    made = make_layer(2, "mean", items, [9, 9, 9], chunk=2, smoothing=True, dtype=torch.float32)
    plain, ahead = moved(made, device), moved(made, device)
    stepping = kernels.bind(plain.key, plain.value, plain.heads, 0.3, 0.5)
    retrieval = kernels.bind(ahead.key, ahead.value, ahead.heads, 0.3, 0.5)
    fetch = Prefetch([head.segment for head in made.heads], 0.8, queues, torch.device(device))
    seen: list[tuple[Tensor, ...]] = []
    turns = 0
    before, last = state(plain), None

    def look() -> Tensor:
        seen.append(state(ahead))
        return torch.zeros(0)

    for query in walk(made, 6):
        stepping.step(query.to(device))
        after = state(plain)
        given = query.to(device).clone()
        fetch.step(retrieval, given, look)
        given.fill_(float("nan"))  # the caller's tensor is its own again
        for number, head in enumerate(made.heads):
            turned = True
            if last is not None:
                pairs = zip(query[head.segment], last[head.segment], strict=True)
                cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
                turned = sum(cosines) / len(cosines) < 0.8
                turns += turned
            expected = after if turned else before
            assert torch.equal(seen[-1][2 + number], expected[2 + number])
            rows = slice(head.hot_start, head.hot_start + head.hot * head.chunk)
            for part in (0, 1):
                assert torch.equal(seen[-1][part][rows], expected[part][rows])
        before, last = after, query
    queues.join()
    if device == "cuda":
        torch.cuda.synchronize()
    for mine, other in zip(state(ahead), before, strict=True):
        assert torch.equal(mine, other)
    assert retrieval.fetched.tolist() == stepping.fetched.tolist()
    assert int(fetch.corrected.sum()) == turns == 4


@QUEUES
def test_attention_sees_one_step_before_or_this_one(queues: type) -> None:
    check_walk(TorchKernels(), "cpu", queues(), [60, 71, 40])


@QUIET
@pytest.mark.parametrize("device", DEVICES)
def test_triton_selects_for_some_heads(device: str) -> None:
    queues: Queues = Late() if device == "cpu" else prefetch.CudaQueues(torch.device("cuda"))
    check_walk(triton_kernels(torch.float32), device, queues, [60, 71, 40])


def decode(
    model: Any, monkeypatch: pytest.MonkeyPatch, queues: type | None, steps: int, **options: Any
) -> tuple[list[Tensor], Any]:
    """Logits of forced tokens, with growth and compressions on the way; then the cache."""
    if queues is not None:
        for module in (retrieving, handles):
            monkeypatch.setattr(module, "queues_for", lambda device: queues())
    profile = uniform_profile(model, "dynamic", index="mean", chunk=4)
    with apply(model, profile, budget=0.3, compress_every=12, **options) as handle, torch.no_grad():
        cache = handle.new_cache()
        out = [model(input_ids=token_ids(2, 120), **with_cache(model, cache)).logits[:, -1]]
        for one in token_ids(2, steps, seed=4).split(1, dim=1):
            out.append(model(input_ids=one, **with_cache(model, cache)).logits[:, -1])
        cache.batch_select_indices(torch.tensor([1, 0]))
        several = model(input_ids=token_ids(2, 3, seed=6), **with_cache(model, cache))
        return [*out, several.logits[:, -1]], cache


@QUEUES
def test_where_all_is_corrected_nothing_changes(
    queues: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two queries have a cosine of 1: every head selects before it attends."""
    model = random_llama()
    expected, plain = decode(model, monkeypatch, None, 30)
    got, cache = decode(model, monkeypatch, queues, 30, prefetch=1.0)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    mine, other = cache.receipt(), plain.receipt()
    assert (mine.hit_rate, mine.bytes_moved) == (other.hit_rate, other.bytes_moved)


def test_a_slow_queue_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growth, compressions, other rows and later turns see what went aside."""
    model = random_llama()
    early, _ = decode(model, monkeypatch, InOrder, 30, prefetch=0.2)
    late, _ = decode(model, monkeypatch, Late, 30, prefetch=0.2)
    for mine, other in zip(late, early, strict=True):
        assert torch.equal(mine, other)
    plain, _ = decode(model, monkeypatch, None, 30)
    assert not torch.allclose(early[5], plain[5], atol=1e-4), "nothing was prefetched"


def test_prefetch_is_refused_where_nothing_overlaps() -> None:
    model = random_llama()
    with pytest.raises(UsageError, match="this model is on cpu, where nothing would overlap"):
        apply(model, uniform_profile(model, "dynamic"), budget=0.3, prefetch=0.85)
    with pytest.raises(UsageError, match=r"a cosine in \(0, 1\] such as 0.85, found 1.5"):
        Options(prefetch=1.5)
