"""The runtime on a CUDA device: the same answers as on the CPU, bytes as told, nobody waits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hkvprof.bench.filled import FilledSetup
from hkvprof.bench.run import bench_filled
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.models.calls import with_cache
from hkvprof.runtime.graph import GraphDecoder
from hkvprof.runtime.storage import HostChunks
from tests.models_for_tests import apply, left_padded, random_llama, token_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TYPES = ["static", "dynamic", "hybrid"]


def profile_of(model: Any, types: str) -> Any:
    kinds: Any = np.arange(6).reshape(3, 2) % 2 if types == "hybrid" else types
    return uniform_profile(model, kinds, index="mean", chunk=4)


def generate(device: str, types: str, **options: Any) -> tuple[torch.Tensor, Any]:
    """Tokens of a batch of unequal prompts, over compressions; and the receipt."""
    model = random_llama().to(device)
    ids, mask = (tensor.to(device) for tensor in left_padded([170, 133]))
    with apply(model, profile_of(model, types), budget=0.3, **options) as handle:
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=40, min_new_tokens=40,
            do_sample=False,
        )  # fmt: skip
        return out.cpu(), handle.receipt()


@pytest.mark.parametrize("host_dtype", ["same", "int8"])
@pytest.mark.parametrize("types", TYPES)
def test_generate_says_what_the_cpu_says(types: str, host_dtype: str) -> None:
    options = {"compress_every": 16, "host_dtype": host_dtype}
    expected, cpu = generate("cpu", types, **options)
    got, gpu = generate("cuda", types, **options)
    assert torch.equal(got, expected)
    assert gpu.kernels.startswith("CUDA: triton")
    assert gpu.resident_bytes == cpu.resident_bytes
    assert cpu.host_bytes <= gpu.host_bytes <= 1.13 * cpu.host_bytes  # room for what comes


@pytest.mark.parametrize("types", TYPES)
@torch.no_grad()
def test_the_receipt_tells_what_the_allocator_does(types: str) -> None:
    """But for its blocks of 512 bytes."""
    model = random_llama().to("cuda")
    ids = token_ids(4, 3000).to("cuda")
    with apply(model, profile_of(model, types), budget=0.2) as handle:
        model(input_ids=ids, **with_cache(model, handle.new_cache()))  # workspaces
        before = torch.cuda.memory_allocated()
        cache = handle.new_cache()
        model(input_ids=ids, **with_cache(model, cache), logits_to_keep=1)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
    receipt = cache.receipt()
    blocks = sum(len(layer.heads) for layer in receipt.layers) * 4 + 16
    assert receipt.resident_bytes <= held <= receipt.resident_bytes + 512 * blocks
    assert held < 0.22 * receipt.dense_bytes


@pytest.mark.parametrize("prefetch", [None, 0.85])
@pytest.mark.parametrize("types", TYPES)
@torch.no_grad()
def test_whole_steps_do_not_wait(types: str, prefetch: float | None) -> None:
    """Transformers' forward included, over growth and binding anew."""
    model = random_llama().to("cuda")
    tokens = token_ids(2, 40).to("cuda").split(1, dim=1)
    profile = profile_of(model, types)
    with apply(model, profile, budget=0.3, compress_every=0, prefetch=prefetch) as handle:
        cache = handle.new_cache()
        model(input_ids=token_ids(2, 300).to("cuda"), **with_cache(model, cache))
        for one in tokens[:3]:  # compiles
            model(input_ids=one, **with_cache(model, cache))
        before = cache.covered[0].ragged.storage.key
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for one in tokens[3:]:
                model(input_ids=one, **with_cache(model, cache))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert cache.covered[0].ragged.storage.key is not before
        assert (cache.receipt().hit_rate is None) == (types == "static")


@pytest.mark.parametrize("types", TYPES)
@torch.no_grad()
def test_graphs_say_what_steps_say(types: str) -> None:
    """In bfloat16, with compressions between graphs."""
    model = random_llama().to("cuda", torch.bfloat16)
    tokens = token_ids(2, 80, seed=3).to("cuda").split(1, dim=1)
    with apply(model, profile_of(model, types), budget=0.3, compress_every=48) as handle:
        plain, recorded = handle.new_cache(), handle.new_cache()
        for cache in (plain, recorded):
            model(input_ids=token_ids(2, 200).to("cuda"), **with_cache(model, cache))
        decoder = GraphDecoder(model, recorded)
        for one in tokens:
            expected = model(input_ids=one, **with_cache(model, plain)).logits[:, -1]
            torch.testing.assert_close(decoder(one), expected, rtol=0.05, atol=0.05)
        assert decoder.replays > 40


def test_host_items_are_pinned_and_arrive() -> None:
    key, value = torch.randn(2, 50, 1, 64, device="cuda", dtype=torch.bfloat16)
    store = HostChunks.store(key, value)
    assert store.data.is_pinned()
    store = store.append(key[:9], value[:9])
    assert store.data.is_pinned()
    got = store.fetch(torch.arange(59), torch.device("cpu"))
    assert torch.equal(got[:50, 0], key.cpu())
    assert torch.equal(got[50:, 1], value[:9].cpu())


def test_a_small_benchmark(tmp_path: Path) -> None:
    """All methods run; graphs, the allocator's bytes and prefetch included."""
    setup = FilledSetup(
        layers=2, contexts=(4096,), batches=(2,), budgets=("0.10",), steps=4, rounds=2,
        prefill_tokens=1024, link_megabytes=64,
    )  # fmt: skip
    result = bench_filled(setup, tmp_path / "made.json", lambda line: None)
    (context,) = result.contexts
    assert not [row for row in context.rows if row.reason]
    for row in context.rows:
        if row.budget == "0.10" and not row.control:
            assert row.held_share is not None
            assert 0.09 < row.held_share < 0.102
        assert row.step_ms is not None
        assert row.step_ms > 0
    assert json.loads((tmp_path / "made.json").read_text())["complete"]
