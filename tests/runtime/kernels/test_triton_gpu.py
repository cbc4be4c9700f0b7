"""What only a CUDA device can show: no waiting of the host, and replay of a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.models.calls import with_cache
from hkvprof.runtime.kernels import Extents
from hkvprof.runtime.kernels.reference import TorchKernels
from hkvprof.runtime.storage import RaggedStorage
from tests.models_for_tests import apply, random_llama, token_ids
from tests.runtime.kernels.triton_cases import HAS_TRITON, INTERPRETED, triton_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_TRITON or INTERPRETED or not torch.cuda.is_available(),
        reason="needs triton and a CUDA device",
    ),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("types", ["static", "dynamic"])
def test_decoding_steps_do_not_wait(types: str) -> None:
    """Appending, growth, binding again, retrieval and attention, over many tokens."""
    model = random_llama().to("cuda")
    profile = uniform_profile(model, types, index="mean", chunk=8)
    with apply(model, profile, budget=0.3, compress_every=0) as handle:
        cache = handle.new_cache()
        model(input_ids=token_ids(2, 300).to("cuda"), **with_cache(model, cache))
        for _ in range(3):  # compiles
            model(input_ids=token_ids(2, 1).to("cuda"), **with_cache(model, cache))
        layer = cache.covered[0].ragged
        before = layer.storage.key
        key, value = torch.randn(2, 2, 2, 1, 16, device="cuda")
        query = torch.randn(2, 4, 1, 16, device="cuda")
        with no_waiting():
            for _ in range(60):
                layer.append(key, value)
                layer.attend_one(query)
        assert layer.storage.key is not before
        receipt = cache.receipt()
        assert receipt.kernels.startswith("CUDA: triton")
        assert (receipt.hit_rate is None) == (types == "static")


def test_a_graph_replays_steps_of_static_heads() -> None:
    """Within the capacity: lengths advance on the device."""
    lengths, dim = [70, 300, 9], 64
    random = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device="cuda", dtype=torch.bfloat16)

    keys, values = ([normal(n, dim) for n in lengths] for _ in range(2))
    storage = RaggedStorage(keys, values)
    kernels = triton_kernels(torch.bfloat16)
    new = normal(2, 3, 1, dim)
    query = normal(3, 7, dim)

    def step() -> torch.Tensor:
        storage.append(new[0], new[1])
        return kernels.attend(storage.key, storage.value, storage.extents, query, 0.125)

    def remember() -> None:
        for segment in range(3):
            keys[segment] = torch.cat([keys[segment], new[0, segment]])
            values[segment] = torch.cat([values[segment], new[1, segment]])

    step()  # grows, and compiles
    remember()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        new.copy_(normal(2, 3, 1, dim))
        query.copy_(normal(3, 7, dim))
        graph.replay()
        remember()
        counts = [len(key) for key in keys]
        starts = [sum(counts[:segment]) for segment in range(3)]
        expected = TorchKernels().attend(
            torch.cat(keys), torch.cat(values), Extents.of(starts, counts, "cuda"), query, 0.125
        )
        torch.testing.assert_close(out, expected, rtol=0.03, atol=0.03)
