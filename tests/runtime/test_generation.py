"""Long generation, prompts in chunks and assisted decoding on a compressed cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import CompressionError, UsageError
from hkvprof.heads import KeepRule
from hkvprof.models.calls import with_cache
from hkvprof.runtime import measure_storage
from hkvprof.runtime.accounts import measure_queries
from tests.models_for_tests import apply, left_padded, random_llama, token_ids
from tests.runtime.reference import kept_positions, masked_cache, masked_step
from tests.runtime.test_handle import TYPES, logits_of, profile_of

torch.set_num_threads(1)
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


@pytest.fixture
def llama() -> Any:
    return random_llama()


@torch.no_grad()
def compare_with_masked_dense(
    model: Any, profile: Any, ids: Tensor, mask: Tensor, steps: int, **options: Any
) -> Any:
    """Step by step: logits equal dense attention under the mask of what is resident."""
    plain = copy.deepcopy(model)
    reference = masked_cache(plain)
    with apply(model, profile, **options) as handle:
        cache = handle.new_cache()
        out = model(input_ids=ids, attention_mask=mask, **with_cache(model, cache)).logits
        for step in range(steps):
            token = (out[:, -1:].argmax(-1) + step) % 60 + 1
            padding = mask
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            out = model(input_ids=token, attention_mask=mask, **with_cache(model, cache)).logits
            if step == 0:
                plain(input_ids=ids, attention_mask=padding, **with_cache(model, reference))
            kept = [
                kept_positions(ours, theirs.keys)
                for ours, theirs in zip(cache.covered, reference.layers, strict=True)
            ]
            before = reference.get_seq_length()
            expected = masked_step(
                plain, reference, kept, before, input_ids=token, attention_mask=mask
            )
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
            resident, host = measure_storage(cache)
            receipt = cache.receipt()
            assert (receipt.resident_bytes, receipt.host_bytes) == (resident, host)
            assert receipt.query_bytes == measure_queries(cache)
    return cache


@pytest.mark.parametrize("types", TYPES)
def test_generation_equals_masked_dense_attention(llama: Any, types: str) -> None:
    ids, mask = left_padded([120, 97])
    options: dict[str, Any] = {"budget": 0.35, "compress_every": 24}
    cache = compare_with_masked_dense(llama, profile_of(llama, types), ids, mask, 80, **options)
    assert all(layer.account.compressions > 4 for layer in cache.covered)
    assert all(layer.ragged.seen <= layer.ragged.until for layer in cache.covered)


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
def test_smoothing_equals_masked_dense_attention(llama: Any, smoothing: float) -> None:
    ids, mask = left_padded([150, 131])
    options: dict[str, Any] = {"budget": 0.3, "compress_every": 12, "smoothing": smoothing}
    compare_with_masked_dense(llama, profile_of(llama, "dynamic"), ids, mask, 30, **options)


@pytest.mark.parametrize("types", TYPES)
def test_share_stays_at_the_budget_however_long_the_generation(llama: Any, types: str) -> None:
    ids = token_ids(1, 300)
    keep = KeepRule(sinks=4, recent=8, window=16)
    with apply(llama, profile_of(llama, types), budget=0.2, compress_every=32) as handle:
        out = llama.generate(input_ids=ids, max_new_tokens=700, **GREEDY)
        receipt = handle.receipt()
        assert out.shape[1] == 1000
        assert receipt.resident_share <= 1.05 * 0.2
        assert handle.profile.keep == keep
        assert 1 + 699 // 32 <= min(layer.compressions for layer in receipt.layers) < 2 * 699 / 32
    with apply(llama, profile_of(llama, types), budget=0.2, compress_every=0) as handle:
        llama.generate(input_ids=ids, max_new_tokens=300, **GREEDY)
        assert handle.receipt().resident_share > 0.5


def test_sinks_and_recent_tokens_stay(llama: Any) -> None:
    ids = token_ids(1, 150)
    with apply(llama, profile_of(llama, "static"), budget=0.2, compress_every=20) as handle:
        cache = handle.new_cache()
        logits_of(llama, cache, ids, None, 0)
        first = [layer.ragged.storage.keys(0)[:4].clone() for layer in cache.covered]
        layer = cache.covered[0]
        for step in range(61):
            last = layer.ragged.storage.keys(0)[-8:].clone()
            before = layer.account.compressions
            llama(input_ids=ids[:, step : step + 1], **with_cache(llama, cache))
            if layer.account.compressions > before:
                assert layer.ragged.tail == 1
                assert torch.equal(layer.ragged.storage.keys(0)[-9:-1], last)
        assert layer.account.compressions > 61 // 20
        for layer, sinks in zip(cache.covered, first, strict=True):
            assert torch.equal(layer.ragged.storage.keys(0)[:4], sinks)


@pytest.mark.parametrize("budget", [60, "24KiB"])
def test_budgets_in_tokens_and_bytes_do_not_grow(llama: Any, budget: Any) -> None:
    ids = token_ids(1, 200)
    with apply(llama, profile_of(llama, "static"), budget=budget, compress_every=16) as handle:
        llama.generate(input_ids=ids, max_new_tokens=100, **GREEDY)
        middle = _resident_tokens(handle.receipt())
        llama.generate(input_ids=ids, max_new_tokens=500, **GREEDY)
        end = _resident_tokens(handle.receipt())
    assert all(abs(a - b) <= 17 for a, b in zip(middle, end, strict=True))


def _resident_tokens(receipt: Any) -> list[int]:
    return [head.tokens_resident for layer in receipt.layers for head in layer.heads]


def test_a_dense_conversation_is_compressed_once_it_is_long(llama: Any) -> None:
    ids = token_ids(1, 40)
    with apply(llama, profile_of(llama, "mixed"), budget=0.25, compress_every=32) as handle:
        llama.generate(input_ids=ids, max_new_tokens=20, **GREEDY)
        assert "min_tokens" in handle.receipt().layers[0].reason
        llama.generate(input_ids=ids, max_new_tokens=200, **GREEDY)
        receipt = handle.receipt()
    assert receipt.compressed_layers == 3
    assert receipt.resident_share < 0.5


@pytest.mark.parametrize("types", TYPES)
def test_a_long_later_turn_joins_the_budget(llama: Any, types: str) -> None:
    first, second = token_ids(2, 200, seed=1), token_ids(2, 300, seed=2)
    with apply(llama, profile_of(llama, types), budget=0.25) as handle:
        cache = handle.new_cache()
        logits_of(llama, cache, first, None, 2)
        logits_of(llama, cache, second, None, 2)
        assert cache.receipt().resident_share < 0.3


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("lengths", [[260], [260, 150, 201]])
def test_prefill_in_chunks_keeps_the_same_tokens(
    llama: Any, types: str, lengths: list[int]
) -> None:
    ids, mask = left_padded(lengths)
    prompt = ids.shape[1]
    dense = DynamicCache(config=llama.config)
    llama(input_ids=ids, attention_mask=mask, **with_cache(llama, dense))
    keys = [layer.keys for layer in dense.layers]
    with apply(llama, profile_of(llama, types), budget=0.25) as handle:
        whole, parts = handle.new_cache(), handle.new_cache(prompt_tokens=prompt)
        llama(input_ids=ids, attention_mask=mask, **with_cache(llama, whole))
        for begin in range(0, prompt, 64):
            end = min(prompt, begin + 64)
            llama(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end],
                **with_cache(llama, parts),
            )
            if end < prompt:
                receipt = parts.receipt()
                assert receipt.host_bytes == 3 * 2 * 4 * keys[0].numel()
                assert measure_storage(parts) == (receipt.resident_bytes, receipt.host_bytes)
        for one, other, key in zip(whole.covered, parts.covered, keys, strict=True):
            assert kept_positions(one, key) == kept_positions(other, key)
        assert whole.receipt().resident_bytes == parts.receipt().resident_bytes
        assert whole.receipt().host_bytes == parts.receipt().host_bytes


@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_prefill_chunk_size_of_generate(llama: Any, budget: float) -> None:
    ids, mask = left_padded([200, 150])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, **GREEDY}
    with apply(llama, profile_of(llama, "static"), budget=budget) as handle:
        expected = llama.generate(input_ids=ids, **options)
        shares = [handle.receipt().resident_share]
        got = llama.generate(input_ids=ids, prefill_chunk_size=48, **options)
        shares.append(handle.receipt().resident_share)
    assert torch.equal(got, expected)
    assert shares[0] == shares[1]


def test_prefill_holds_one_dense_layer_at_a_time(llama: Any) -> None:
    ids = token_ids(1, 800)
    for chunk in (None, 100):
        with apply(llama, profile_of(llama, "mixed"), budget=0.2) as handle:
            llama.generate(input_ids=ids, max_new_tokens=1, prefill_chunk_size=chunk, **GREEDY)
            receipt = handle.receipt()
        one_dense_layer = receipt.dense_bytes // 3
        window = 3 * 4 * 16 * 16 * 4
        assert receipt.peak_bytes <= receipt.resident_bytes + one_dense_layer + window
        assert receipt.peak_bytes > one_dense_layer


def test_prompt_lookup_equals_plain_decoding(llama: Any) -> None:
    ids = token_ids(1, 60).repeat(1, 3)
    with apply(llama, profile_of(llama, "static"), budget=0.5, compress_every=30) as handle:
        expected = llama.generate(input_ids=ids, max_new_tokens=100, **GREEDY)
        share = handle.receipt().resident_share
        got = llama.generate(
            input_ids=ids, max_new_tokens=100, prompt_lookup_num_tokens=4, **GREEDY
        )
        assert handle.receipt().compressed_layers == 3
        assert abs(handle.receipt().resident_share - share) < 0.15
    # Compression happens at other tokens when several come at once; up to there they agree.
    assert torch.equal(got[:, :188], expected[:, :188])
    with apply(llama, profile_of(llama, "static"), budget=0.5, compress_every=0):
        expected = llama.generate(input_ids=ids, max_new_tokens=60, **GREEDY)
        got = llama.generate(input_ids=ids, max_new_tokens=60, prompt_lookup_num_tokens=4, **GREEDY)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("types", TYPES)
def test_assisted_decoding(llama: Any, types: str) -> None:
    ids, assistant = token_ids(1, 180), random_llama(seed=3)
    with apply(llama, profile_of(llama, types), budget=0.5, compress_every=16) as handle:
        got = llama.generate(input_ids=ids, assistant_model=assistant, max_new_tokens=60, **GREEDY)
        receipt = handle.receipt()
        assert receipt.compressed_layers == 3
        assert min(layer.compressions for layer in receipt.layers) > 2
    assert got.shape[1] > 180
    with apply(llama, profile_of(llama, types), budget=1.0):
        full = llama.generate(input_ids=ids, assistant_model=assistant, max_new_tokens=20, **GREEDY)
    plain = llama.generate(input_ids=ids, assistant_model=assistant, max_new_tokens=20, **GREEDY)
    assert torch.equal(full, plain)


@pytest.mark.parametrize("types", TYPES)
def test_beams_over_several_compressions_equal_rows_of_their_own(llama: Any, types: str) -> None:
    """Rows that share host items go apart: each continues as if it had been alone."""
    ids = token_ids(1, 150)
    tails = token_ids(3, 40, seed=5)
    with apply(llama, profile_of(llama, types), budget=0.4, compress_every=16) as handle:
        beams = handle.new_cache()
        llama(input_ids=ids, **with_cache(llama, beams))
        beams.batch_repeat_interleave(3)
        together = [
            llama(input_ids=tails[:, i : i + 1], **with_cache(llama, beams)).logits
            for i in range(40)
        ]
        receipt = beams.receipt()
        assert (receipt.resident_bytes, receipt.host_bytes) == measure_storage(beams)
        for row in range(3):
            alone = handle.new_cache()
            llama(input_ids=ids, **with_cache(llama, alone))
            for i in range(40):
                got = llama(
                    input_ids=tails[row, i : i + 1][None], **with_cache(llama, alone)
                ).logits
                error = (together[i][row] - got[0]).abs().max()
                assert error <= 1e-4 * got.abs().max()


def test_crop_stops_at_what_is_compressed(llama: Any) -> None:
    with apply(llama, profile_of(llama, "mixed"), budget=0.4, compress_every=16) as handle:
        cache = handle.new_cache()
        logits_of(llama, cache, token_ids(1, 150), None, 20)
        tail = cache.covered[0].ragged.tail
        assert tail < 20
        with pytest.raises(CompressionError, match=f"only the {tail} tokens"):
            cache.crop(-tail - 1)
        cache.crop(-tail)
        assert cache.get_seq_length() == 170 - tail
        assert measure_storage(cache)[0] == cache.receipt().resident_bytes
        logits_of(llama, cache, token_ids(1, 9), None, 20)


def test_int8_host_memory_is_near_and_small(llama: Any) -> None:
    ids = token_ids(1, 400)
    results = {}
    for kind in ("same", "int8"):
        with apply(
            llama, profile_of(llama, "dynamic"), budget=0.4, host_dtype=kind, compress_every=16
        ) as handle:
            cache = handle.new_cache()
            out = logits_of(llama, cache, ids, None, 0)
            for i in range(40):
                out.append(llama(input_ids=ids[:, i : i + 1], **with_cache(llama, cache)).logits)
            receipt = cache.receipt()
            assert (receipt.resident_bytes, receipt.host_bytes) == measure_storage(cache)
            results[kind] = (out, receipt)
    same, int8 = results["same"], results["int8"]
    assert int8[1].host_bytes < 0.35 * same[1].host_bytes  # of float32, scales included
    assert int8[1].resident_bytes == same[1].resident_bytes
    assert int8[1].bytes_moved < same[1].bytes_moved
    errors = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(int8[0], same[0], strict=True)
    ]
    # A selection that flips for a near tie shows in single steps.
    assert 0 < sorted(errors)[len(errors) // 2] < 0.05


def test_bytes_moved_count_what_was_fetched(llama: Any) -> None:
    with apply(llama, profile_of(llama, "dynamic"), budget=0.3) as handle:
        llama.generate(input_ids=token_ids(1, 300), max_new_tokens=20, **GREEDY)
        receipt = handle.receipt()
    fetched = sum(head.chunks_fetched for layer in receipt.layers for head in layer.heads)
    assert receipt.bytes_moved == fetched * 8 * 2 * 16 * 4
    assert fetched > 0
    assert receipt.steps == 19
    assert receipt.to_json()["bytes_moved"] == receipt.bytes_moved
    assert 0 < receipt.hit_rate < 1


def test_streaming_gives_every_token_once(llama: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.ids += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ended = True

    ids, streamer = token_ids(1, 150), Streamer()
    with apply(llama, profile_of(llama, "mixed"), budget=0.3, compress_every=8):
        out = llama.generate(input_ids=ids, max_new_tokens=30, streamer=streamer, **GREEDY)
    assert streamer.ended
    assert streamer.ids == out[0].tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("types", TYPES)
def test_a_broken_row_leaves_the_others_alone(llama: Any, types: str, value: float) -> None:
    ids = token_ids(2, 150)
    clean = llama.get_input_embeddings()(ids).detach()
    broken = clean.clone()
    broken[0, 70] = value
    results = []
    with apply(llama, profile_of(llama, types), budget=0.4, compress_every=8) as handle:
        for embeds in (clean, broken):
            cache = handle.new_cache()
            llama(inputs_embeds=embeds, **with_cache(llama, cache))
            steps = [
                llama(input_ids=ids[:, i : i + 1], **with_cache(llama, cache)).logits[1]
                for i in range(20)
            ]
            results.append(torch.stack(steps))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode_compression": False}, "compress_every=0"),
        ({"compress_every": -3}, "at least 0"),
        ({"host_dtype": "int4"}, "same, int8"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"retrieve_every": 2}, "select at every step"),
        ({"min_tokens": 0}, "min_tokens"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(llama: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply(llama, uniform_profile(llama), **options)
    assert llama.config._attn_implementation == "sdpa"
