"""A shared prefill leaves a cache as the model itself leaves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.evaluate.prefill import capture
from hkvprof.models.calls import last_row_only, with_cache
from hkvprof.runtime import measure_storage
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import apply

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def prompt() -> tuple[Any, Any, Any]:
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    sample = make_sample("list", 1, images=8, split="calibration")
    return model, processor, processor.encode([sample.messages])


@torch.no_grad()
@pytest.mark.parametrize("types", ["static", "dynamic"])
@pytest.mark.parametrize("budget", [0.35, 1.0])
def test_filled_cache_decodes_as_after_a_prefill_of_its_own(
    prompt: tuple[Any, Any, Any], types: str, budget: float
) -> None:
    model, _, encoded = prompt
    shared = capture(model, encoded)
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    with apply(model, uniform_profile(model, types, chunk=4), budget=budget) as handle:
        own = handle.new_cache()
        inputs = encoded.to(model.device, model.dtype)
        logits = model(**inputs, **with_cache(model, own), **last_row_only(model)).logits
        assert torch.equal(logits[:, -1], shared.logits)
        for _ in range(2):  # what was captured can be used again
            filled = handle.new_cache()
            shared.fill(filled)
            assert filled.receipt().resident_bytes == own.receipt().resident_bytes
            assert measure_storage(filled) == measure_storage(own)
            twin = handle.new_cache()
            shared.fill(twin)
            token = shared.logits.argmax(-1, keepdim=True)
            steps = []
            for cache in (filled, twin):
                out = [model(input_ids=token, **with_cache(model, cache)).logits for _ in range(3)]
                steps.append(torch.cat(out))
            assert torch.equal(*steps)
        real = torch.cat(
            [model(input_ids=token, **with_cache(model, own)).logits for _ in range(3)]
        )
        assert torch.equal(real, steps[0])


@torch.no_grad()
def test_dense_cache_is_independent_of_what_was_captured(prompt: tuple[Any, Any, Any]) -> None:
    model, _, encoded = prompt
    shared = capture(model, encoded)
    token = shared.logits.argmax(-1, keepdim=True)
    expected = DynamicCache(config=model.config.get_text_config(decoder=True))
    inputs = encoded.to(model.device, model.dtype)
    model(**inputs, **with_cache(model, expected), **last_row_only(model))
    want = model(input_ids=token, **with_cache(model, expected)).logits
    for _ in range(2):
        cache = shared.dense_cache()
        assert torch.equal(model(input_ids=token, **with_cache(model, cache)).logits, want)
