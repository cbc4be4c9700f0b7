"""Prefix caching: what follows a short dense prefix is planned with it, as one prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hkvprof.models.calls import with_cache
from hkvprof.runtime import measure_storage
from tests.models_for_tests import apply, left_padded, random_llama, token_ids
from tests.runtime.test_handle import TYPES, profile_of

torch.set_num_threads(1)
GREEDY: dict[str, Any] = {
    "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, "max_new_tokens": 6,
    "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
EVERY: list[dict[str, Any]] = [{"compress_every": 0}, {"compress_every": 200}, {}]


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()


def plan_of(cache: Any) -> Any:
    receipt = cache.receipt()
    heads = [[(h.strategy, h.tokens_resident) for h in layer.heads] for layer in receipt.layers]
    return heads, receipt.compressed_layers, receipt.resident_bytes, receipt.host_bytes


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("types", TYPES)
@torch.no_grad()
def test_the_recipe_of_transformers_plans_prefix_and_prompt_as_one(
    llama: Any, types: str, options: dict[str, Any]
) -> None:
    """deepcopy(prefix cache), then generate() on the longer prompt: as without the prefix cache."""
    prefix = token_ids(1, 40)
    prompts = [torch.cat([prefix, token_ids(1, n, seed=n)], dim=1) for n in (150, 90)]
    with apply(llama, profile_of(llama, types), budget=0.4, **options) as handle:
        kept = handle.new_cache()
        llama(input_ids=prefix, **with_cache(llama, kept))
        assert kept.receipt().compressed_layers == 0
        for prompt in prompts:
            branch, whole = copy.deepcopy(kept), handle.new_cache()
            for cache in (branch, whole):
                got = llama.generate(input_ids=prompt, **with_cache(llama, cache), **GREEDY)
                if cache is branch:
                    first = got
            assert torch.equal(first.sequences, got.sequences)
            assert plan_of(branch) == plan_of(whole)
            assert branch.receipt().compressed_layers == 3
            for a, b in zip(first.logits, got.logits, strict=True):
                assert (a - b).abs().max() <= 1e-4 * b.abs().max()
        assert kept.get_seq_length() == 40
        assert kept.receipt().compressed_layers == 0


@pytest.mark.parametrize("new_alone", [False, True])
@torch.no_grad()
def test_near_the_dense_model_when_nearly_all_is_kept(llama: Any, new_alone: bool) -> None:
    """Also where generate() is given the new tokens alone, and a mask of all."""
    prefix, turn = token_ids(1, 40), token_ids(1, 150, seed=5)
    ids = turn if new_alone else torch.cat([prefix, turn], dim=1)
    mask = torch.ones(1, 190, dtype=torch.long)

    def run(cache: Any) -> Any:
        llama(input_ids=prefix, **with_cache(llama, cache))
        inputs = {"input_ids": ids, "attention_mask": mask}
        return llama.generate(**inputs, **with_cache(llama, cache), **GREEDY)

    expected = run(DynamicCache(config=llama.config))
    options: dict[str, Any] = {"budget": 0.97, "compress_every": 0}
    with apply(llama, profile_of(llama, "dynamic"), **options) as handle:
        cache = handle.new_cache()
        got = run(cache)
        assert cache.receipt().compressed_layers == 3
        assert cache.covered[0].ragged.rows[0].base == 190
    assert (got.logits[0] - expected.logits[0]).abs().max() <= 1e-5 * expected.logits[0].abs().max()
    with apply(llama, profile_of(llama, "dynamic"), budget=1.0) as handle:
        got = run(handle.new_cache())
    for a, b in zip(got.logits, expected.logits, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("chunk", [None, 50])
@torch.no_grad()
def test_the_rest_may_come_in_chunks(llama: Any, types: str, chunk: int | None) -> None:
    prefix = token_ids(2, 40)
    prompt = torch.cat([prefix, token_ids(2, 150, seed=3)], dim=1)
    stock = DynamicCache(config=llama.config)
    llama(input_ids=prefix, **with_cache(llama, stock))
    options = {**GREEDY, "prefill_chunk_size": chunk}
    llama.generate(input_ids=prompt, **with_cache(llama, stock), **options)
    if stock.get_seq_length() != 190 + GREEDY["max_new_tokens"] - 1:
        pytest.skip("transformers 5.16 reads chunks of the prefix again")
    with apply(llama, profile_of(llama, types), budget=0.4, compress_every=0) as handle:
        branch, whole = handle.new_cache(), handle.new_cache()
        llama(input_ids=prefix, **with_cache(llama, branch))
        llama.generate(input_ids=prompt, **with_cache(llama, branch), **options)
        llama.generate(input_ids=prompt, **with_cache(llama, whole), **GREEDY)
        assert plan_of(branch) == plan_of(whole)
        assert measure_storage(branch) == measure_storage(whole)


@pytest.mark.parametrize("types", TYPES)
@torch.no_grad()
def test_a_long_turn_by_hand_joins_before_the_next_pass(llama: Any, types: str) -> None:
    """One may take tokens of the turn back until then, as after guesses of one's own."""
    ids, mask = left_padded([40, 31])
    turn = token_ids(2, 153, seed=4)
    step = token_ids(2, 1, seed=6)
    with apply(llama, profile_of(llama, types), budget=0.4, compress_every=0) as handle:
        cache, whole = handle.new_cache(), handle.new_cache()
        llama(input_ids=ids, attention_mask=mask, **with_cache(llama, cache))
        longer = torch.cat([mask, torch.ones_like(turn)], dim=1)
        llama(input_ids=turn, attention_mask=longer, **with_cache(llama, cache))
        if types == "dynamic":  # static heads would choose by three rows less
            cache.crop(-3)
            turn, longer = turn[:, :-3], longer[:, :-3]
        assert cache.receipt().compressed_layers == 0
        both = torch.cat([ids, turn], dim=1)
        llama(input_ids=both, attention_mask=longer, **with_cache(llama, whole))
        longer = torch.cat([longer, torch.ones_like(step)], dim=1)
        got, expected = (
            llama(input_ids=step, attention_mask=longer, **with_cache(llama, one)).logits
            for one in (cache, whole)
        )
        assert plan_of(cache)[1:] == plan_of(whole)[1:]
        assert cache.receipt().compressed_layers == 3
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_what_is_generated_stays_whole_until_a_turn_comes(llama: Any) -> None:
    ids = token_ids(1, 40)
    options = {**GREEDY, "max_new_tokens": 60}
    with apply(llama, profile_of(llama, "mixed"), budget=0.4, compress_every=0) as handle:
        cache = handle.new_cache()
        out = llama.generate(input_ids=ids, **with_cache(llama, cache), **options).sequences
        assert cache.receipt().compressed_layers == 0
        guesses = {**options, "prompt_lookup_num_tokens": 3}
        guessed = llama.generate(input_ids=ids, **with_cache(llama, handle.new_cache()), **guesses)
        assert handle.receipt().compressed_layers == 0
        assert torch.equal(guessed.sequences, out)
        more = torch.cat([out, token_ids(1, 70, seed=7)], dim=1)
        llama.generate(input_ids=more, **with_cache(llama, cache), **GREEDY)
        assert cache.receipt().compressed_layers == 3
        assert cache.covered[0].ragged.rows[0].base == more.shape[1]


@torch.no_grad()
def test_a_short_row_beside_a_long_one_joins_with_its_turn(llama: Any) -> None:
    ids, mask = left_padded([150, 30])
    turn: Tensor = token_ids(2, 100, seed=4)
    with apply(llama, profile_of(llama, "static"), budget=0.4, compress_every=0) as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, attention_mask=mask, **with_cache(llama, cache))
        assert [row.is_whole for row in cache.covered[0].ragged.rows] == [False, True]
        mask = torch.cat([mask, torch.ones_like(turn)], dim=1)
        llama(input_ids=turn, attention_mask=mask, **with_cache(llama, cache))
        mask = torch.cat([mask, mask[:, :1] * 0 + 1], dim=1)
        llama(input_ids=turn[:, :1], attention_mask=mask, **with_cache(llama, cache))
        rows = cache.covered[0].ragged.rows
        assert [row.is_whole for row in rows] == [False, False]
        assert [row.base for row in rows] == [150, 250]
