"""Every architecture that the documentation names: exact at budget 1.0, compressed below."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hkvprof import load_model, uniform_profile
from hkvprof.models.calls import cache_of, with_cache
from hkvprof.runtime import Handle
from hkvprof.runtime.layer import CompressedLayer
from tests.models.conversations import picture, user
from tests.models.tiny import COVERED, build_covered
from tests.models_for_tests import apply

PROMPT = 200
PADDED = 37
STEPS = 4
MODELS = [*COVERED, "tinyvl with images"]


@cache
def prepared(name: str) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """A model, the inputs of a batch of two with left padding, and its own logits."""
    if name == "tinyvl with images":
        model, processor = load_model("tinyvl", dtype="float32", device="cpu")
        long, short = (picture(280, 280, i) for i in range(2)), (picture(280, 224, 2),)
        inputs = processor.encode(
            [[user(*long, "how many disc")], [user(*short, "how many disc")]]
        ).to(model.device, model.dtype)
    else:
        model = build_covered(name)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(10, 128, (2, PROMPT), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, :PADDED] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
    return model, inputs, logits(model, inputs, None)


def logits(model: Any, inputs: dict[str, Tensor], handle: Handle | None) -> list[Tensor]:
    """Of the prompt and of four steps; without a handle, on the cache that the model makes."""

    def fresh() -> dict[str, Any]:
        return {} if handle is None else with_cache(model, handle.new_cache())

    with torch.no_grad():
        output = model(**inputs, **fresh(), use_cache=True)
        if "pixel_values" in inputs:  # positions after images are prepared by generate() alone
            return [output.logits, *generated_logits(model, inputs, fresh())]
        collected, mask = [output.logits], inputs["attention_mask"]
        for step in range(STEPS):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            output = model(
                input_ids=torch.full((2, 1), 20 + step),
                attention_mask=mask,
                **with_cache(model, cache_of(output)),
            )
            collected.append(output.logits)
    return collected


def generated_logits(
    model: Any, inputs: dict[str, Tensor], cache: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Logits of the steps after the prompt's."""
    generated = model.generate(
        **inputs, **cache, max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return tuple(generated.logits[1:])


@pytest.mark.parametrize("name", MODELS)
def test_everything_kept_is_bit_identical(name: str) -> None:
    model, inputs, expected = prepared(name)
    with apply(model, uniform_profile(model), budget=1.0) as handle:
        found = logits(model, inputs, handle)
    assert len(found) == STEPS + 1
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    again = logits(model, inputs, None)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True)), "not restored"


@pytest.mark.parametrize("types", ["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_every_covered_layer_is_compressed(name: str, types: str) -> None:
    model, inputs, expected = prepared(name)
    profile = uniform_profile(model, types)
    budget = 0.5 if types == "dynamic" else 0.3  # every row holds an index of its own
    with apply(model, profile, budget=budget) as handle:
        cache = handle.new_cache()
        with torch.no_grad():
            prefill = model(**inputs, **with_cache(model, cache)).logits
        receipt = cache.receipt()
        found = logits(model, inputs, handle)
    covered = [i for i, layer in enumerate(cache.layers) if isinstance(layer, CompressedLayer)]
    assert len(covered) == profile.grid.layers == receipt.compressed_layers
    assert receipt.resident_share <= budget
    assert (receipt.host_bytes > 0) is (types == "dynamic")
    assert torch.equal(prefill, expected[0]), "the prompt itself is attended to densely"
    assert all(bool(step.isfinite().all()) for step in found)
    assert not torch.equal(found[1], expected[1]), "nothing was left out"


def test_sliding_layers_stay_stock() -> None:
    model, inputs, _ = prepared("gemma3")
    with apply(model, uniform_profile(model), budget=0.3) as handle:
        cache = handle.new_cache()
        with torch.no_grad():
            model(**inputs, **with_cache(model, cache))
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "CompressedLayer"] * 2
    window = cache.layers[0]
    assert isinstance(window, DynamicLayer)
    assert window.keys is not None
    assert window.keys.shape[2] == 31, "a window of 32 holds 31 earlier tokens"
