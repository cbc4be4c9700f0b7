"""Indexes of models whose keys have a bias: what is encoded and what is added back, end to end."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hkvprof.errors import ModelError
from hkvprof.evaluate.prefill import capture
from hkvprof.heads import HeadType, Strategy
from hkvprof.models.adapter import view_model
from hkvprof.models.calls import with_cache
from hkvprof.models.rotary import rotating_keys
from hkvprof.profile.record import Profile
from hkvprof.runtime import measure_storage
from hkvprof.selection.index import ProjectedIndex
from tests.models.conversations import picture, user
from tests.models.families import processor_of, words
from tests.models.tiny import build_covered
from tests.models_for_tests import apply, left_padded, token_ids
from tests.runtime.test_forecast import measured

MENU = (Strategy(HeadType.DYNAMIC, index="projected", bits=32),)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}


def biased(name: str = "qwen2", **changes: Any) -> Any:
    """A tiny model whose keys have biases far larger than the rest of them."""
    model = build_covered(name, **changes).eval()
    with torch.no_grad():
        for module in view_model(model).attention:
            module.k_proj.bias.copy_(torch.linspace(-9, 12, module.k_proj.bias.numel()))
    return model


def profile_of(model: Any) -> Profile:
    """All heads dynamic, the whole bias taken out."""
    profile, keys = measured(model, MENU), rotating_keys(model, view_model(model))
    assert profile.index is not None
    assert keys is not None
    own = {"key_bias": keys.bias, "frequency": keys.frequency, "axis": keys.axis}
    return replace(profile, index=replace(profile.index, **own))


@contextmanager
def without_biases(model: Any) -> Iterator[None]:
    """Within: keys have none; those of the first layer are else as they were."""
    biases = [module.k_proj.bias for module in view_model(model).attention]
    held = [bias.detach().clone() for bias in biases]
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
        yield
        for bias, old in zip(biases, held, strict=True):
            bias.copy_(old)


@torch.no_grad()
def dense_keys(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The first layer's keys [rows, kv_heads, tokens, dim] where there are no biases."""
    from transformers.cache_utils import DynamicCache

    with without_biases(model):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, **with_cache(model, cache))
    return cache.layers[0].keys


def check_index(cache: Any, dense: Tensor, rows: list[int]) -> None:
    """Of the first layer: keys less the rotated bias are those without biases, wherever a token
    stands, and what is added to logits is what was taken out."""
    layer = cache.covered[0].ragged
    assert layer is not None
    assert layer.dynamic
    query = torch.randn(3, dense.shape[-1], generator=torch.Generator().manual_seed(0))
    for segment, head in layer.dynamic.items():
        row, number = divmod(segment, layer.kv_heads)
        index, start = head.index, cache.conversation.starts[row]
        assert isinstance(index, ProjectedIndex)
        assert index.positions is not None
        assert index.tables.bias is not None
        assert index.items == index.positions.count == head.layout.items
        keys = head.host.everything(torch.device("cpu"))[:, 0, 0]
        still = index.tables.bias.removed(keys, index.positions)
        begin = start + head.layout.sinks
        wanted = dense[rows[row], number, begin : begin + head.layout.items]
        torch.testing.assert_close(still, wanted, rtol=0, atol=2e-3)
        added = index.tables.bias.logits(query, index.positions)
        torch.testing.assert_close(query @ still.T + added, query @ keys.T, rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": YARN}])
@torch.no_grad()
def test_a_prompt_steps_and_a_later_turn(changes: dict[str, Any]) -> None:
    model = biased(**changes)
    ids = token_ids(1, 400, vocabulary=128)
    dense = dense_keys(model, {"input_ids": ids})
    with apply(model, profile_of(model), budget=0.3, compress_every=16) as handle:
        cache = handle.new_cache()
        model(input_ids=ids[:, :300], **with_cache(model, cache))
        check_index(cache, dense, [0])
        for token in ids[:, 300:330].split(1, dim=1):
            model(input_ids=token, **with_cache(model, cache))
        model(input_ids=ids[:, 330:390], **with_cache(model, cache))
        model(input_ids=ids[:, 390:391], **with_cache(model, cache))
        assert cache.covered[0].ragged.dynamic[0].layout.items > 340
        check_index(cache, dense, [0])
        held = measure_storage(cache)
        assert held == (cache.receipt().resident_bytes, cache.receipt().host_bytes)


@torch.no_grad()
def test_padded_rows_beams_and_branches() -> None:
    model = biased()
    ids, mask = left_padded([260, 180])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    dense = dense_keys(model, inputs)
    with apply(model, profile_of(model), budget=0.3) as handle:
        cache = handle.new_cache()
        model(**inputs, **with_cache(model, cache))
        check_index(cache, dense, [0, 1])
        branch = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        check_index(cache, dense, [1, 1])
        check_index(branch, dense, [0, 1])


@torch.no_grad()
def test_positions_that_do_not_count_up_are_told() -> None:
    model = biased()
    ids = token_ids(1, 300, vocabulary=128)
    position = torch.arange(300)[None] // 3 * 2
    inputs = {"input_ids": ids, "position_ids": position}
    with apply(model, profile_of(model), budget=0.3) as handle:
        cache = handle.new_cache()
        model(**inputs, **with_cache(model, cache))
    check_index(cache, dense_keys(model, inputs), [0])


@torch.no_grad()
def test_generate_in_chunks_and_with_guesses() -> None:
    model = biased()
    ids = token_ids(1, 300, vocabulary=128)
    for options in ({"prefill_chunk_size": 70}, {"prompt_lookup_num_tokens": 4}):
        with apply(model, profile_of(model), budget=0.3, compress_every=16) as handle:
            cache = handle.new_cache()
            out = model.generate(
                ids, **with_cache(model, cache), max_new_tokens=40, min_new_tokens=40,
                do_sample=False, **options,
            )  # fmt: skip
        check_index(cache, dense_keys(model, {"input_ids": out}), [0])


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
@torch.no_grad()
def test_images_have_positions_on_three_axes(name: str) -> None:
    model = biased(name)
    processor, _ = processor_of(name, model)
    message = user(picture(56, 56), words(40), picture(56, 28, 1), words(60, 1))
    inputs = processor.encode([[message]]).to(model.device, model.dtype)
    with apply(model, profile_of(model), budget=0.4, compress_every=16) as handle:
        cache = handle.new_cache()
        out = model.generate(
            **inputs, **with_cache(model, cache), max_new_tokens=30, min_new_tokens=30,
            do_sample=False, suppress_tokens=[5, 6, 7, 8],
        )  # fmt: skip
        held = measure_storage(cache)
        assert held == (cache.receipt().resident_bytes, cache.receipt().host_bytes)
    index = cache.covered[0].ragged.dynamic[0].index
    assert index.positions.told.shape == (3, index.items)
    more = out.shape[1] - inputs["input_ids"].shape[1]
    assert more == 30
    grown = {**inputs, "input_ids": out, "attention_mask": torch.ones_like(out)}
    if (kinds := inputs.get("mm_token_type_ids")) is not None:
        grown["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, more))
    check_index(cache, dense_keys(model, grown), [0])


@torch.no_grad()
def test_a_shared_prefill_brings_its_positions() -> None:
    """As evaluation fills caches of many methods."""
    model = biased("qwen2.5-vl")
    processor, _ = processor_of("qwen2.5-vl", model)
    encoded = processor.encode([[user(picture(56, 56), words(40), picture(56, 28, 1), words(90))]])
    prefill = capture(model, encoded)
    with apply(model, profile_of(model), budget=0.4) as handle:
        filled, passed = handle.new_cache(prefill.tokens), handle.new_cache(prefill.tokens)
        prefill.fill(filled)
        model(**encoded.to(model.device, model.dtype), **with_cache(model, passed))
    pairs = [cache.covered[1].ragged.dynamic for cache in (filled, passed)]
    for segment, head in pairs[0].items():
        other = pairs[1][segment].index
        assert head.index.positions.told is not None
        assert torch.equal(head.index.positions.told, other.positions.told)
        assert torch.equal(head.index.codes, other.codes)


def test_a_model_that_tells_no_positions_is_refused() -> None:
    model = biased()
    profile = profile_of(model)
    model.model.hidden, model.model.rotary_emb = model.model.rotary_emb, None
    with pytest.raises(ModelError, match="no module `rotary_emb`"):
        apply(model, profile)
