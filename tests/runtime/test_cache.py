"""The compressed cache over several turns, beams and cuts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import CompressionError
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.models.calls import with_cache
from hkvprof.runtime import measure_storage
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import apply, left_padded, random_llama, token_ids
from tests.runtime.test_handle import TYPES, logits_of, profile_of

torch.set_num_threads(1)


@pytest.fixture
def llama() -> Any:
    return random_llama()


@pytest.mark.parametrize("types", TYPES)
def test_second_turn_at_full_budget_is_bit_identical(llama: Any, types: str) -> None:
    first, second = token_ids(2, 120, seed=1), token_ids(2, 33, seed=2)
    dense = DynamicCache(config=llama.config)
    expected = [*logits_of(llama, dense, first, None, 3), *logits_of(llama, dense, second, None, 3)]
    with apply(llama, profile_of(llama, types), budget=1.0) as handle:
        cache = handle.new_cache()
        got = [*logits_of(llama, cache, first, None, 3), *logits_of(llama, cache, second, None, 3)]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_second_turn_sees_every_host_chunk(llama: Any) -> None:
    """All heads dynamic: a pass of several tokens attends to the whole prompt, exactly."""
    ids, mask = left_padded([200, 177])
    later = token_ids(2, 25, seed=7)
    both = torch.cat([mask, torch.ones_like(later)], dim=1)
    dense = DynamicCache(config=llama.config)
    llama(input_ids=ids, attention_mask=mask, **with_cache(llama, dense))
    expected = llama(input_ids=later, attention_mask=both, **with_cache(llama, dense)).logits
    with apply(llama, profile_of(llama, "dynamic"), budget=0.3) as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, attention_mask=mask, **with_cache(llama, cache))
        got = llama(input_ids=later, attention_mask=both, **with_cache(llama, cache)).logits
        assert cache.receipt().resident_share < 0.4
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("every", [0, 16])
def test_third_turn_sees_everything_that_dynamic_heads_moved(llama: Any, every: int) -> None:
    """Turns of several tokens stay exact, also when earlier turns have gone to the host."""
    turns = [token_ids(2, length, seed=length) for length in (200, 25, 31, 18)]
    dense = DynamicCache(config=llama.config)
    with apply(llama, profile_of(llama, "dynamic"), budget=0.3, compress_every=every) as handle:
        cache = handle.new_cache()
        got = [llama(input_ids=ids, **with_cache(llama, cache)).logits for ids in turns]
        assert {layer.account.compressions for layer in cache.covered} == {3 if every else 1}
    expected = [llama(input_ids=ids, **with_cache(llama, dense)).logits for ids in turns]
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_several_new_tokens_equal_one_by_one(llama: Any) -> None:
    """Static heads: a turn in one pass equals the same tokens fed one at a time."""
    ids, later = token_ids(2, 150), token_ids(2, 6, seed=9)
    with apply(llama, profile_of(llama, "static"), budget=0.3) as handle:
        together, single = handle.new_cache(), handle.new_cache()
        llama(input_ids=ids, **with_cache(llama, together))
        llama(input_ids=ids, **with_cache(llama, single))
        got = llama(input_ids=later, **with_cache(llama, together)).logits
        steps = [
            llama(input_ids=later[:, i : i + 1], **with_cache(llama, single)).logits
            for i in range(6)
        ]
        assert together.receipt().compressed_layers == 3
    expected = torch.cat(steps, dim=1)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("types", TYPES)
def test_crop_takes_back_generated_tokens(llama: Any, types: str) -> None:
    ids = token_ids(1, 200)
    with apply(llama, profile_of(llama, types), budget=0.4, smoothing=0.0) as handle:
        cache, fresh = handle.new_cache(), handle.new_cache()
        logits_of(llama, cache, ids, None, 4)
        cache.crop(-3)
        assert cache.get_seq_length() == 201
        resident, host = measure_storage(cache)
        assert cache.receipt().resident_bytes == resident
        assert cache.receipt().host_bytes == host
        first = logits_of(llama, fresh, ids, None, 0)[0][:, -1:].argmax(-1)
        llama(input_ids=first, **with_cache(llama, fresh))
        other = torch.full_like(first, 11)
        a = llama(input_ids=other, **with_cache(llama, cache)).logits
        b = llama(input_ids=other, **with_cache(llama, fresh)).logits
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_crop_into_the_prompt_is_refused(llama: Any) -> None:
    with apply(llama, profile_of(llama, "static"), budget=0.3) as handle:
        cache = handle.new_cache()
        logits_of(llama, cache, token_ids(1, 150), None, 2)
        with pytest.raises(CompressionError, match="only the 2 tokens"):
            cache.crop(-3)
        assert cache.get_seq_length() == 152


@pytest.mark.parametrize("types", TYPES)
def test_reordered_rows_continue_as_their_sources(llama: Any, types: str) -> None:
    ids, mask = left_padded([190, 160, 175])
    with apply(llama, profile_of(llama, types), budget=0.4) as handle:
        cache, plain = handle.new_cache(), handle.new_cache()
        for one in (cache, plain):
            logits_of(llama, one, ids, mask, 2)
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
        full = torch.cat([mask, mask.new_ones(3, 3)], dim=1)
        token = torch.tensor([[7], [8], [9]])
        expected = llama(input_ids=token, attention_mask=full, **with_cache(llama, plain)).logits
        got = llama(
            input_ids=token[order], attention_mask=full[order], **with_cache(llama, cache)
        ).logits
        resident, host = measure_storage(cache)
        receipt = cache.receipt()
    assert (got - expected[order]).abs().max() <= 1e-5 * expected.abs().max()
    assert (receipt.resident_bytes, receipt.host_bytes) == (resident, host)


def test_beam_search_equals_beams_on_dense_storage_at_high_budget(llama: Any) -> None:
    ids = token_ids(1, 150)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    expected = llama.generate(input_ids=ids, **options)
    with apply(llama, profile_of(llama, "static"), budget=0.995) as handle:
        got = llama.generate(input_ids=ids, **options)
        assert handle.receipt().compressed_layers == 3
    assert got.shape == expected.shape
    with apply(llama, profile_of(llama, "mixed"), budget=1.0):
        assert torch.equal(llama.generate(input_ids=ids, **options), expected)


def test_reset_makes_a_cache_new_again(llama: Any) -> None:
    ids = token_ids(1, 150)
    with apply(llama, profile_of(llama, "mixed"), budget=0.4) as handle:
        cache = handle.new_cache()
        first = logits_of(llama, cache, ids, None, 2)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = logits_of(llama, cache, ids, None, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nan_in_one_row_leaves_the_others_alone(llama: Any) -> None:
    ids = token_ids(2, 150)
    embedding = llama.get_input_embeddings()
    clean = embedding(ids).detach()
    broken = clean.clone()
    broken[0] = torch.nan
    for types in TYPES:
        with apply(llama, profile_of(llama, types), budget=0.4) as handle:
            results = []
            for embeds in (clean, broken):
                cache = handle.new_cache()
                llama(inputs_embeds=embeds, **with_cache(llama, cache))
                token = torch.full((2, 1), 5)
                results.append(llama(input_ids=token, **with_cache(llama, cache)).logits[1])
        assert torch.equal(*results)


def test_host_allocation_failure_is_one_error_and_the_model_stays_usable(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = token_ids(1, 200)
    real = torch.empty

    def fail(*args: Any, **kwargs: Any) -> Any:
        if "pin_memory" in kwargs:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(*args, **kwargs)

    with apply(llama, profile_of(llama, "dynamic"), budget=0.4) as handle:
        expected = logits_of(llama, handle.new_cache(), ids, None, 2)
        monkeypatch.setattr(torch, "empty", fail)
        with pytest.raises(CompressionError, match="host memory for a dynamic head"):
            llama(input_ids=ids)
        monkeypatch.undo()
        got = logits_of(llama, handle.new_cache(), ids, None, 2)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.fixture(scope="module")
def tinyvl() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32")


def test_second_turn_through_generate_with_images(tinyvl: tuple[Any, Any]) -> None:
    """At budget 1.0 a second generate() on the same cache gives what the plain model gives."""
    model, processor = tinyvl
    sample = make_sample("find", 3, images=4, split="calibration")
    inputs = processor.encode([sample.messages]).to(model.device, model.dtype)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}

    def talk(cache: Any) -> torch.Tensor:
        ids = model.generate(**inputs, **with_cache(model, cache), **options)
        more = torch.tensor([processor.encode_text("what is at A1 of image #2")])
        ids = torch.cat([ids, more], dim=1)
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **with_cache(model, cache),
            **options,
        )

    expected = talk(DynamicCache(config=model.config.get_text_config(decoder=True)))
    with apply(model, uniform_profile(model), budget=1.0) as handle:
        assert torch.equal(talk(handle.new_cache()), expected)
    with apply(model, uniform_profile(model), budget=0.4) as handle:
        assert talk(handle.new_cache()).shape[1] > 0
        assert handle.receipt().compressed_layers == 6


def test_text_prior_keeps_text_first(tinyvl: tuple[Any, Any]) -> None:
    model, processor = tinyvl
    base = uniform_profile(model, keep=KeepRule(sinks=1, recent=1, window=8))
    prior = hkvprof.Profile(
        **{
            **{name: getattr(base, name) for name in base.__dataclass_fields__},
            "strategies": (Strategy(HeadType.STATIC, text_prior=1.0),),
            "strategy": np.zeros_like(base.strategy),
            "loss": base.loss[:, :1].copy(),
            "output_error": base.output_error[:, :1].copy(),
        }
    )
    encoded = processor.encode([make_sample("find", 3, images=4, split="calibration").messages])
    text = int((encoded.modality == 0).sum())
    with apply(model, prior, budget=text + 6) as handle:
        cache = handle.new_cache()
        model(**encoded.to(model.device, model.dtype), **with_cache(model, cache))
        dense = DynamicCache(config=model.config.get_text_config(decoder=True))
        handle.detach()
        model(**encoded.to(model.device, model.dtype), **with_cache(model, dense))
        stored = cache.covered[0].ragged.storage.keys(0)
        wanted = dense.layers[0].keys[0, 0][encoded.modality[0] == 0]
        found = (wanted[:, None] == stored[None]).all(-1).any(-1)
    assert bool(found.all())
