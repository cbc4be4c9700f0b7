"""The tail is part of the budget: from the first token to the last, whatever is generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hkvprof
import hkvprof.runtime
from hkvprof.runtime import measure_storage
from hkvprof.runtime.accounts import measure_queries
from hkvprof.runtime.receipt import Receipt
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import apply, left_padded, random_llama, token_ids
from tests.runtime.test_forecast import FOLDER, MENUS, measured
from tests.runtime.test_handle import profile_of

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()


def check(receipt: Receipt) -> None:
    """The promise, over all rows."""
    assert receipt.excess == ""
    heads = [head for layer in receipt.layers for head in layer.heads]
    tokens = sum(head.tokens_seen for head in heads)
    worth = receipt.budget_bytes / receipt.dense_bytes * tokens / len(heads)
    if worth >= 128:
        assert receipt.resident_bytes <= 1.05 * receipt.budget_bytes + 8 * len(heads)
    else:
        assert receipt.over_tokens <= 8
    said = "over the budget" in str(receipt)
    assert said == bool(receipt.over_bytes)


def check_cache(cache: Any) -> None:
    """The promise, and that the receipt tells what is there."""
    receipt = cache.receipt()
    assert measure_storage(cache) == (receipt.resident_bytes, receipt.host_bytes)
    assert measure_queries(cache) == receipt.query_bytes
    check(receipt)


def made(model: Any, name: str) -> Any:
    return measured(model, MENUS["all"]) if name == "measured" else profile_of(model, name)


@pytest.mark.parametrize("name", ["static", "dynamic", "mixed", "measured"])
@pytest.mark.parametrize(
    ("tokens", "budget"),
    [(150, 0.35), (700, 0.2), (1500, 0.12), (500, 0.9), (600, 110), (900, "150KiB")],
)
@torch.no_grad()
def test_single_tokens(llama: Any, name: str, tokens: int, budget: Any) -> None:
    with apply(llama, made(llama, name), budget=budget) as handle:
        cache = handle.new_cache()
        llama(input_ids=token_ids(1, tokens), past_key_values=cache)
        for one in token_ids(1, 90, seed=2).split(1, dim=1):
            check_cache(cache)
            llama(input_ids=one, past_key_values=cache)
        check_cache(cache)
        if isinstance(budget, float):
            worth = budget * cache.receipt().dense_bytes
            assert cache.receipt().budget_bytes == pytest.approx(worth, abs=1)


@pytest.mark.parametrize("tokens", [64, 100, 300])
@pytest.mark.parametrize("budget", [0.05, 0.1, 20])
@torch.no_grad()
def test_little_budgets(llama: Any, tokens: int, budget: Any) -> None:
    """Static heads at a few tokens each; where the floor is more than the budget it is refused."""
    if budget == 0.05 and tokens < 300:
        pytest.skip("refused: below the floor")
    with apply(llama, profile_of(llama, "static"), budget=budget, strict=False) as handle:
        cache = handle.new_cache()
        llama(input_ids=token_ids(1, tokens), past_key_values=cache)
        for one in token_ids(1, 60, seed=2).split(1, dim=1):
            llama(input_ids=one, past_key_values=cache)
            if cache.receipt().compressed_layers:
                check_cache(cache)


@pytest.mark.parametrize("name", ["static", "mixed", "measured"])
@torch.no_grad()
def test_turns(llama: Any, name: str) -> None:
    """A turn that is longer than the room is told of while it runs, and is in the budget then."""
    with apply(llama, made(llama, name), budget=0.3) as handle:
        cache = handle.new_cache()
        llama(input_ids=token_ids(1, 400), past_key_values=cache)
        for turn in range(4):
            llama(input_ids=token_ids(1, 150, seed=turn), past_key_values=cache)
            receipt = cache.receipt()
            assert receipt.excess.startswith("a pass was longer than the room left")
            assert f"because {receipt.excess}" in str(receipt)
            for one in token_ids(1, 20, seed=turn).split(1, dim=1):
                llama(input_ids=one, past_key_values=cache)
                check_cache(cache)


@pytest.mark.parametrize("budget", [0.3, 90, "260KiB"])
@torch.no_grad()
def test_rows_of_unequal_length(llama: Any, budget: Any) -> None:
    ids, mask = left_padded([400, 150, 231])
    with apply(llama, profile_of(llama, "mixed"), budget=budget) as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, attention_mask=mask, past_key_values=cache)
        for one in token_ids(3, 70, seed=2).split(1, dim=1):
            check_cache(cache)
            mask = torch.cat([mask, torch.ones_like(one)], dim=1)
            llama(input_ids=one, attention_mask=mask, past_key_values=cache)


def test_compress_every_is_an_upper_bound(llama: Any) -> None:
    counts = {}
    for every in (4, 128):
        with apply(llama, profile_of(llama, "static"), budget=0.5, compress_every=every) as handle:
            llama.generate(input_ids=token_ids(1, 300), max_new_tokens=61, **GREEDY)
            counts[every] = handle.receipt().layers[0].compressions
            check(handle.receipt())
    assert counts[4] == 1 + 60 // 4 - 1
    assert counts[128] < 6


def test_what_is_kept_whole_is_told(llama: Any) -> None:
    with apply(llama, profile_of(llama, "static"), budget=0.2, compress_every=0) as handle:
        llama.generate(input_ids=token_ids(1, 300), max_new_tokens=40, **GREEDY)
        receipt = handle.receipt()
    assert receipt.query_bytes == 0
    assert receipt.over_tokens > 30
    assert "compress_every=0" in receipt.excess
    assert f"because {receipt.excess}" in str(receipt)
    assert receipt.to_json()["excess"] == receipt.excess


@torch.no_grad()
def test_an_index_that_outgrows_its_budget_is_told(llama: Any) -> None:
    with apply(llama, profile_of(llama, "dynamic"), budget=64) as handle:
        cache = handle.new_cache()
        llama(input_ids=token_ids(1, 600), past_key_values=cache)
        check_cache(cache)
        llama(input_ids=token_ids(1, 400, seed=2), past_key_values=cache)
        for one in token_ids(1, 3, seed=2).split(1, dim=1):
            llama(input_ids=one, past_key_values=cache)
        assert "need more than its budget" in cache.receipt().excess


@pytest.mark.parametrize("name", ["static", "mixed"])
def test_assisted_decoding(llama: Any, name: str) -> None:
    """Guesses may go beyond the room while they run; the next pass is in the budget again."""
    with apply(llama, profile_of(llama, name), budget=0.4) as handle:
        llama.generate(
            input_ids=token_ids(1, 300), assistant_model=random_llama(seed=3), max_new_tokens=60,
            **GREEDY,
        )  # fmt: skip
        receipt = handle.receipt()
    assert receipt.compressed_layers == 3
    assert receipt.resident_share <= 0.45


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.2])
@torch.no_grad()
def test_the_profile_of_tinyvl(budget: float) -> None:
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    sample = make_sample("list", 1, images=14, split="calibration")
    encoded = processor.encode([sample.messages])
    with hkvprof.runtime.apply(model, FOLDER / "tinyvl.hkv.safetensors", budget=budget) as handle:
        cache = handle.new_cache()
        out = model(**encoded.to(model.device, model.dtype), past_key_values=cache).logits
        for _ in range(60):
            check_cache(cache)
            out = model(input_ids=out[:, -1:].argmax(-1), past_key_values=cache).logits
