"""apply(): identity at full budget, equality with masked dense attention below, clean removal."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import BudgetError, CompressionError, ModelError, ProfileError, UsageError
from hkvprof.models.calls import cache_keyword, cache_of, with_cache
from hkvprof.runtime import CompressedCache, measure_storage
from hkvprof.runtime.handle import open_profile
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import apply, left_padded, random_llama, token_ids
from tests.runtime.reference import kept_positions, masked_cache, masked_step

TYPES = ("static", "dynamic", "mixed")
torch.set_num_threads(1)


@pytest.fixture
def llama() -> Any:
    return random_llama()


@pytest.fixture(scope="module")
def tinyvl() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32")


def profile_of(model: Any, types: str) -> Any:
    chunk = {"index": "mean", "chunk": 8}
    if types != "mixed":
        return uniform_profile(model, types, **chunk)
    shape = uniform_profile(model).strategy.shape
    return uniform_profile(
        model, torch.arange(shape[0] * shape[1]).view(shape).numpy() % 2, **chunk
    )


@torch.no_grad()
def logits_of(model: Any, cache: Any, ids: Tensor, mask: Tensor | None, steps: int) -> list[Tensor]:
    """Logits of a prefill and of `steps` greedy decoding steps."""
    out = [model(input_ids=ids, attention_mask=mask, **with_cache(model, cache)).logits]
    for _ in range(steps):
        token = out[-1][:, -1:].argmax(-1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(token)], dim=1)
        out.append(model(input_ids=token, attention_mask=mask, **with_cache(model, cache)).logits)
    return out


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("lengths", [[150], [150, 90, 121]])
def test_full_budget_is_bit_identical(llama: Any, types: str, lengths: list[int]) -> None:
    ids, mask = left_padded(lengths)
    expected = logits_of(llama, DynamicCache(config=llama.config), ids, mask, 5)
    with apply(llama, profile_of(llama, types), budget=1.0) as handle:
        got = logits_of(llama, handle.new_cache(), ids, mask, 5)
        assert handle.receipt().resident_share == 1
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("types", TYPES)
def test_full_budget_is_bit_identical_with_images(tinyvl: tuple[Any, Any], types: str) -> None:
    model, processor = tinyvl
    samples = [make_sample("find", i, images=3 + i, split="calibration") for i in range(2)]
    inputs = processor.encode([s.messages for s in samples]).to(model.device, model.dtype)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    expected = model.generate(**inputs, **options)
    with apply(model, profile_of(model, types), budget=1.0):
        got = model.generate(**inputs, **options)
    assert torch.equal(expected.sequences, got.sequences)
    assert all(torch.equal(a, b) for a, b in zip(expected.logits, got.logits, strict=True))


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_equals_dense_attention_over_kept_tokens(llama: Any, types: str, budget: float) -> None:
    ids, mask = left_padded([200, 171])
    reference = masked_cache(llama)
    dense = llama(input_ids=ids, attention_mask=mask, **with_cache(llama, reference)).logits
    prompt = ids.shape[1]
    with apply(llama, profile_of(llama, types), budget=budget) as handle:
        cache = handle.new_cache()
        out = llama(input_ids=ids, attention_mask=mask, **with_cache(llama, cache)).logits
        assert torch.equal(out, dense)
        steps = []
        token = out[:, -1:].argmax(-1)
        for _ in range(6):
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            with torch.no_grad():
                out = llama(input_ids=token, attention_mask=mask, **with_cache(llama, cache)).logits
            kept = [
                kept_positions(ours, theirs.keys[:, :, :prompt])
                for ours, theirs in zip(cache.covered, reference.layers, strict=True)
            ]
            steps.append((token, mask, kept, out))
            token = out[:, -1:].argmax(-1)
    for token, mask, kept, out in steps:
        expected = masked_step(llama, reference, kept, prompt, input_ids=token, attention_mask=mask)
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("types", TYPES)
def test_padded_batch_equals_single_runs(llama: Any, types: str) -> None:
    lengths = [180, 140, 163]
    ids, mask = left_padded(lengths)
    # One budget in tokens gives every row its own share; compare rows at the same share instead.
    profile = profile_of(llama, types)
    with apply(llama, profile, budget=0.3) as handle:
        batched = logits_of(llama, handle.new_cache(), ids, mask, 4)
        for row, length in enumerate(lengths):
            alone = logits_of(llama, handle.new_cache(), ids[row : row + 1, -length:], None, 4)
            for a, b in zip(batched[1:], alone[1:], strict=True):
                assert (a[row] - b[0]).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("types", TYPES)
def test_share_and_tensors_agree_with_the_receipt(llama: Any, types: str) -> None:
    ids = token_ids(2, 600)
    for budget in (0.15, 0.25):
        with apply(llama, profile_of(llama, types), budget=budget) as handle:
            cache = handle.new_cache()
            logits_of(llama, cache, ids, None, 0)
            receipt = cache.receipt()
            assert receipt.resident_share <= budget + 0.001
            assert receipt.resident_share > 0.8 * budget
            for _ in range(9):
                llama(input_ids=ids[:, :1], **with_cache(llama, cache))
            receipt = cache.receipt()
            resident, host = measure_storage(cache)
        assert (receipt.resident_bytes, receipt.host_bytes) == (resident, host)
        assert receipt.dense_bytes == 3 * 2 * 2 * 2 * 16 * 4 * 609
        assert (host > 0) == (types != "static")


def test_memory_goes_with_the_cache_without_garbage_collection(llama: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        with apply(llama, profile_of(llama, "mixed"), budget=0.2) as handle:
            cache = handle.new_cache()
            llama(input_ids=token_ids(1, 200), **with_cache(llama, cache))
            storages = [weakref.ref(layer.ragged.storage) for layer in cache.covered]
            hosts = [
                weakref.ref(d.host)
                for layer in cache.covered
                for d in layer.ragged.dynamic.values()
            ]
            del cache
            assert all(reference() is None for reference in storages + hosts)
            short = handle.new_cache()
            llama(input_ids=token_ids(1, 20), **with_cache(llama, short))
            keys = weakref.ref(short.covered[0].keys)
            del short
            assert keys() is None
            assert handle.receipt().layers[0].state == "dense"
    finally:
        gc.enable()


def test_dense_keys_are_gone_after_prefill(llama: Any) -> None:
    seen: list[int] = []

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layers = kwargs[cache_keyword(module.forward)].covered
        seen.append(sum(layer.is_whole for layer in layers))

    hooks = [
        layer.self_attn.register_forward_hook(count, with_kwargs=True)
        for layer in llama.model.layers
    ]
    with apply(llama, profile_of(llama, "static"), budget=0.2):
        llama(input_ids=token_ids(1, 200))
    for hook in hooks:
        hook.remove()
    assert seen == [0, 0, 0]


def test_plain_forward_and_generate_compress(llama: Any) -> None:
    ids = token_ids(1, 200)
    with apply(llama, profile_of(llama, "static"), budget=0.2) as handle:
        output = llama(input_ids=ids)
        assert isinstance(cache_of(output), CompressedCache)
        assert handle.receipt().compressed_layers == 3
        llama.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        receipt = handle.receipt()
        assert receipt.compressed_layers == 3
        assert receipt.layers[0].heads[0].tokens_seen == 203


def test_second_request_starts_fresh(llama: Any) -> None:
    first, second = token_ids(1, 200, seed=3), token_ids(1, 170, seed=4)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    profile = profile_of(llama, "mixed")
    with apply(llama, profile, budget=0.3):
        expected = llama.generate(input_ids=second, **options)
    with apply(llama, profile, budget=0.3):
        llama.generate(input_ids=first, **options)
        assert torch.equal(llama.generate(input_ids=second, **options), expected)


def test_detach_restores_the_original(llama: Any) -> None:
    ids = token_ids(1, 150)
    before = llama(input_ids=ids).logits
    attributes = set(vars(llama))
    handle = apply(llama, profile_of(llama, "dynamic"), budget=0.3)
    llama.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    handle.detach()
    handle.detach()
    assert set(vars(llama)) == attributes
    assert llama.config._attn_implementation == "sdpa"
    assert not llama._forward_hooks
    assert not llama._forward_pre_hooks
    assert torch.equal(llama(input_ids=ids).logits, before)
    with pytest.raises(UsageError, match="detached"):
        handle.new_cache()


def test_an_exception_inside_the_block_detaches(llama: Any) -> None:
    with pytest.raises(RuntimeError, match="mine"), apply(llama, profile_of(llama, "static")):
        raise RuntimeError("mine")
    assert llama.config._attn_implementation == "sdpa"


def test_interleaved_conversations_keep_their_positions(tinyvl: tuple[Any, Any]) -> None:
    model, processor = tinyvl
    samples = [make_sample("list", i, images=images, split="calibration")
               for i, images in enumerate((2, 6))]  # fmt: skip
    inputs = [processor.encode([s.messages]).to(model.device, model.dtype) for s in samples]
    profile = profile_of(model, "static")

    def run(order: list[int]) -> dict[int, list[Tensor]]:
        with apply(model, profile, budget=0.5) as handle:
            caches = [handle.new_cache() for _ in inputs]
            seen: dict[int, list[Tensor]] = {0: [], 1: []}
            for which in order:
                logits = seen[which]
                with torch.no_grad():
                    if not logits:
                        output = model(**inputs[which], **with_cache(model, caches[which]))
                    else:
                        token = logits[-1][:, -1:].argmax(-1)
                        output = model(input_ids=token, **with_cache(model, caches[which]))
                logits.append(output.logits)
            return seen

    alone, mixed = run([0, 0, 0, 1, 1, 1]), run([0, 1, 0, 1, 1, 0])
    for which in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(alone[which], mixed[which], strict=True))


def test_two_threads_with_two_models() -> None:
    models = [random_llama(seed=seed) for seed in (5, 6)]
    profiles = [profile_of(models[0], "static"), profile_of(models[1], "dynamic")]
    ids = token_ids(1, 180)

    def reply(number: int) -> Tensor:
        with apply(models[number], profiles[number], budget=0.3):
            return models[number].generate(input_ids=ids, max_new_tokens=12, do_sample=False)

    expected = [reply(0), reply(1)]
    got: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(number: int) -> None:
        got[number] = [reply(number) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert len(got[number]) == 3
        assert all(torch.equal(ids_, expected[number]) for ids_ in got[number])


# -- refusals -------------------------------------------------------------------------------


def test_profile_of_another_model_is_refused_by_field(llama: Any) -> None:
    with pytest.raises(ProfileError, match=r"grid\.layers: 3 != 2"):
        apply(random_llama(layers=2), uniform_profile(llama))


def test_other_weights_warn(llama: Any) -> None:
    other = random_llama(seed=9)
    with pytest.warns(UserWarning, match="other weights"):
        apply(other, uniform_profile(llama)).detach()


def test_profile_from_a_path(llama: Any, tmp_path: Any) -> None:
    path = uniform_profile(llama, budget=0.2).save(tmp_path / "p.safetensors")
    with apply(llama, path) as handle:
        llama(input_ids=token_ids(1, 300))
        assert handle.receipt().resident_share == pytest.approx(0.2, abs=0.01)


def test_applying_twice_is_refused(llama: Any) -> None:
    with (
        apply(llama, uniform_profile(llama)),
        pytest.raises(UsageError, match="already"),
    ):
        apply(llama, uniform_profile(llama))


def test_foreign_cache_is_refused_unless_told(llama: Any) -> None:
    ids = token_ids(1, 100)
    expected = llama(input_ids=ids).logits
    with (
        apply(llama, uniform_profile(llama)),
        pytest.raises(CompressionError, match="DynamicCache"),
    ):
        llama(input_ids=ids, **with_cache(llama, DynamicCache(config=llama.config)))
    with apply(llama, uniform_profile(llama), strict=False):
        cache = DynamicCache(config=llama.config)
        assert torch.equal(llama(input_ids=ids, **with_cache(llama, cache)).logits, expected)


def test_static_cache_implementation_is_refused(llama: Any) -> None:
    with (
        apply(llama, uniform_profile(llama)),
        pytest.raises(ModelError, match="cache_implementation='static'"),
    ):
        llama.generate(input_ids=token_ids(1, 100), max_new_tokens=2, cache_implementation="static")


def test_output_attentions_is_refused(llama: Any) -> None:
    with (
        apply(llama, uniform_profile(llama)),
        pytest.raises(ModelError, match="output_attentions"),
    ):
        llama(input_ids=token_ids(1, 100), output_attentions=True)


def test_right_padding_is_refused(llama: Any) -> None:
    ids = token_ids(2, 100)
    mask = torch.ones_like(ids)
    mask[0, 90:] = 0
    with (
        apply(llama, uniform_profile(llama), budget=0.5),
        pytest.raises(ModelError, match="left"),
    ):
        llama(input_ids=ids, attention_mask=mask)


def test_short_prompts_stay_dense_and_say_why(llama: Any) -> None:
    ids = token_ids(1, 40)
    expected = logits_of(llama, DynamicCache(config=llama.config), ids, None, 3)
    with apply(llama, uniform_profile(llama), budget=0.3) as handle:
        got = logits_of(llama, handle.new_cache(), ids, None, 3)
        assert "shorter than min_tokens=64" in handle.receipt().layers[0].reason
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_budgets_in_tokens_and_bytes(llama: Any) -> None:
    ids = token_ids(1, 400)
    with apply(llama, uniform_profile(llama), budget=50) as handle:
        llama(input_ids=ids)
        heads = [head for layer in handle.receipt().layers for head in layer.heads]
        assert {head.tokens_resident for head in heads} == {50}
    with apply(llama, uniform_profile(llama), budget="32KiB") as handle:
        llama(input_ids=ids)
        assert 0.9 * 32768 < handle.receipt().resident_bytes <= 32768 + 3 * 2 * 8


def test_too_small_budgets_are_refused(llama: Any) -> None:
    with pytest.raises(BudgetError, match="need 13"):
        apply(llama, uniform_profile(llama), budget=8)
    with (
        apply(llama, uniform_profile(llama), budget=0.02),
        pytest.raises(BudgetError, match="too small"),
    ):
        llama(input_ids=token_ids(1, 100))
    with apply(llama, uniform_profile(llama), budget=0.02, strict=False) as handle:
        llama(input_ids=token_ids(1, 100))
        assert "too small" in handle.receipt().layers[0].reason


def test_an_attention_that_loses_the_mark_is_noticed(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hkvprof.runtime.layer import CompressedLayer

    def unmarked(self: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = original(self, key, value, *args, **kwargs)
        return keys.clone(), values

    original = CompressedLayer.update
    monkeypatch.setattr(CompressedLayer, "update", unmarked)
    with (
        apply(llama, uniform_profile(llama), budget=0.3),
        pytest.raises(CompressionError, match="layer 0: attention got other keys"),
    ):
        llama(input_ids=token_ids(1, 100))


def test_a_profile_that_is_open_is_not_read_again(llama: Any, tmp_path: Path) -> None:
    path = profile_of(llama, "static").save(tmp_path / "p.safetensors")
    opened = open_profile(path)
    path.unlink()
    with apply(llama, opened, 0.5) as handle:
        assert handle.profile is opened.profile
        assert "p.safetensors" in repr(handle)
