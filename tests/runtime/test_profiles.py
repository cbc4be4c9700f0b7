"""The committed profiles: readable, of the models they name, and right through the runtime."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import hkvprof
from hkvprof.models.adapter import view_model
from hkvprof.models.calls import with_cache
from hkvprof.runtime import apply, measure_storage
from hkvprof.testbed.generator import make_sample
from tests.profiles import in_16_bits
from tests.runtime.reference import kept_positions, masked_cache, masked_step

FOLDER = Path(__file__).parents[2] / "profiles"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tinyvl() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda p: p.stem)
def test_profiles_load_and_plan_any_budget(path: Path) -> None:
    profile = hkvprof.load_profile(path)
    assert profile.recipe == "measured"
    for tokens in (400, 4096, 32768):
        for budget in (0.05, 0.1, 0.2, 1.0):
            allocation = profile.allocation(budget, tokens)
            assert allocation.ratio.astype(float).mean() <= budget + 1e-9


def test_tinyvl_profile_belongs_to_the_embedded_model(tinyvl: tuple[Any, Any]) -> None:
    model, _ = tinyvl
    profile = hkvprof.load_profile(FOLDER / "tinyvl.hkv.safetensors")
    assert profile.fingerprint.mismatches(view_model(model).fingerprint) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(model, profile).detach()


@torch.no_grad()
def test_projected_index_equals_dense_attention_over_what_it_fetched(
    tinyvl: tuple[Any, Any],
) -> None:
    model, processor = tinyvl
    sample = make_sample("list", 1, images=12, split="calibration")
    encoded = processor.encode([sample.messages])
    inputs = encoded.to(model.device, model.dtype)
    reference = masked_cache(model)
    dense = model(**inputs, **with_cache(model, reference)).logits
    deltas = model.model.rope_deltas
    prompt = encoded.tokens
    profile = in_16_bits(hkvprof.load_profile(FOLDER / "tinyvl.hkv.safetensors"))
    with apply(model, profile, budget=0.2) as handle:
        cache = handle.new_cache()
        out = model(**inputs, **with_cache(model, cache)).logits
        assert torch.equal(out, dense)
        receipt = cache.receipt()
        assert receipt.resident_share <= 0.2
        assert (receipt.resident_bytes, receipt.host_bytes) == measure_storage(cache)
        assert any("projected" in h.strategy for layer in receipt.layers for h in layer.heads)
        steps = []
        for _ in range(6):
            token = out[:, -1:].argmax(-1)
            out = model(input_ids=token, **with_cache(model, cache)).logits
            kept = [
                kept_positions(ours, theirs.keys[:, :, :prompt])
                for ours, theirs in zip(cache.covered, reference.layers, strict=True)
            ]
            steps.append((token, kept, out))
        assert cache.receipt().hit_rate is not None
    model.model.rope_deltas = deltas
    for token, kept, out in steps:
        expected = masked_step(model, reference, kept, prompt, input_ids=token)
        assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_three_steps_of_the_readme(tinyvl: tuple[Any, Any], tmp_path: Path) -> None:
    """calibrate -> save -> apply -> generate: compressed, and still right at half the bytes."""
    model, processor = tinyvl
    samples = [make_sample("find", i, images=5, split="calibration") for i in range(4)]
    path = hkvprof.calibrate(model, processor, samples).save(tmp_path / "p.safetensors")
    asked = make_sample("cell", 7, images=8, split="heldout")
    encoded = processor.encode([asked.messages])
    inputs = encoded.to(model.device, model.dtype)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with apply(model, path, budget=0.5, min_tokens=64) as handle:
        got = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        receipt = handle.receipt()
    assert torch.equal(got, expected)
    assert receipt.compressed_layers == 6
    assert receipt.resident_share < 0.55
    plain = model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        **with_cache(model, DynamicCache(config=model.config.get_text_config(decoder=True))),
    )
    assert torch.equal(plain, expected)
