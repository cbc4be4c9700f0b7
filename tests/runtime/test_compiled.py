"""torch.compile traces a static layer's step once, however its segments grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import CompressionError
from hkvprof.models.calls import with_cache
from hkvprof.runtime.compiled import StaticStep
from tests.models_for_tests import apply, random_llama, token_ids

STEPS = 64


def compressed_layer(model: Any, types: str) -> Any:
    """The second layer of a cache whose prompt was compressed."""
    profile = uniform_profile(model, types)
    with apply(model, profile, budget=0.3) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(input_ids=token_ids(2, 150).to(model.device), **with_cache(model, cache))
    return cache, cache.covered[1].ragged


def check(device: str, backend: str) -> None:
    torch._dynamo.reset()
    model = random_llama(2).to(device)
    (_keep, plain), (cache, fixed) = (compressed_layer(model, "static") for _ in range(2))
    traced = []

    def counting(graph: Any, inputs: list[Tensor]) -> Any:
        traced.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    step = StaticStep(fixed, STEPS)
    compiled = torch.compile(step, backend=counting, fullgraph=True, dynamic=False)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number in range(STEPS):
            key, value = torch.randn(2, 2, 2, 1, 16, generator=random).to(device)
            query = torch.randn(2, 4, 1, 16, generator=random).to(device)
            plain.append(key, value)
            expected = plain.attend_one(query)
            out = compiled(key.flatten(0, 1), value.flatten(0, 1), query.reshape(4, 2, 16))
            got = out.view(2, 1, 4, 16)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=f"step {number}")
    assert len(traced) == 1
    fixed.advance(STEPS)
    assert (
        fixed.storage.lengths
        == plain.storage.lengths
        == fixed.storage.ends.sub(fixed.storage.starts).tolist()
    )
    for segment in range(4):
        assert torch.equal(fixed.storage.keys(segment), plain.storage.keys(segment))
    receipt = cache.receipt().layers[1]
    assert receipt.steps == STEPS
    assert receipt.heads[0].tokens_seen == 150 + STEPS


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_static_step_is_traced_once(backend: str) -> None:
    check("cpu", backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["aot_eager", "cudagraphs", "inductor"])
def test_a_static_step_is_traced_once_on_the_device(backend: str) -> None:
    check("cuda", backend)


def test_dynamic_heads_are_refused() -> None:
    model = random_llama(2)
    _, layer = compressed_layer(model, "dynamic")
    with pytest.raises(CompressionError, match="layer 1 has 4 dynamic heads"):
        StaticStep(layer, 8)
