"""Rows of unequal length: each has the plan, the bytes and the answers of its prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hkvprof
import hkvprof.runtime
from hkvprof.errors import BudgetError
from hkvprof.models.calls import with_cache
from hkvprof.profile.record import Profile
from hkvprof.runtime import measure_storage
from hkvprof.runtime.accounts import HeadAccount
from hkvprof.runtime.receipt import Receipt
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import apply, left_padded, random_llama, token_ids
from tests.runtime.test_forecast import FOLDER, MENUS, measured
from tests.runtime.test_handle import profile_of

LENGTHS = [400, 40, 150, 231]
"""One of them shorter than `min_tokens`."""
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()


PROFILES = ["static", "mixed", "measured"]


def made(model: Any, name: str) -> Profile:
    return measured(model, MENUS["all"]) if name == "measured" else profile_of(model, name)


def places(mask: Tensor) -> Tensor:
    """Positions of a left-padded batch."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def passes(model: Any, cache: Any, ids: Tensor, mask: Tensor, forced: Tensor) -> Tensor:
    """Logits [rows, steps + 1, vocabulary] of a prompt and of forced tokens."""
    first = {"input_ids": ids, "attention_mask": mask, "position_ids": places(mask)}
    out = [model(**first, **with_cache(model, cache)).logits[:, -1]]
    for one in forced.split(1, dim=1):
        mask = torch.cat([mask, torch.ones_like(one)], dim=1)
        step = {"input_ids": one, "attention_mask": mask, "position_ids": places(mask)[:, -1:]}
        out.append(model(**step, **with_cache(model, cache)).logits[:, -1])
    return torch.stack(out, dim=1)


def heads_of(receipt: Receipt, row: int) -> list[list[HeadAccount]]:
    return [[head for head in layer.heads if head.row == row] for layer in receipt.layers]


def kept(heads: list[list[HeadAccount]]) -> list[Any]:
    """What does not depend on how much slack a layer has made."""
    return [
        (head.head, head.strategy, head.tokens_seen, head.tokens_resident, head.host_bytes)
        for layer in heads
        for head in layer
    ]


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("budget", [0.3, 70])
@pytest.mark.parametrize("fetch", ["unlimited", None])
def test_a_row_is_its_prompt_alone(llama: Any, name: str, budget: Any, fetch: Any) -> None:
    """Plans and bytes after the prompt, tokens and logits over compressions and a turn later.

    With a budget of reads a selection depends on those before it, and one that a near tie flips
    shows in all steps after it: weights that differ by 1e-6 do the same to this model.
    """
    profile = made(llama, name)
    ids, mask = left_padded(LENGTHS)
    forced = token_ids(4, 50, seed=3)
    options: dict[str, Any] = {"budget": budget, "min_tokens": 64, "fetch": fetch}
    dense = passes(llama, hkvprof_free(llama), ids, mask, forced)
    with apply(llama, profile, **options) as handle:
        batch = handle.new_cache()
        llama(input_ids=ids, attention_mask=mask, **with_cache(llama, batch))
        after_prompt = batch.receipt()
        assert measure_storage(batch) == (after_prompt.resident_bytes, after_prompt.host_bytes)
        batch = handle.new_cache()
        together = passes(llama, batch, ids, mask, forced)
        later = batch.receipt()
        assert measure_storage(batch) == (later.resident_bytes, later.host_bytes)
        assert later.compressed_layers == 3
        short = "row 1: prompt of 40 tokens is shorter than min_tokens=64"
        assert after_prompt.layers[0].reason == short
        for row, length in enumerate(LENGTHS):
            one, alone = ids[row : row + 1, -length:], handle.new_cache()
            whole = torch.ones_like(one)
            llama(input_ids=one, **with_cache(llama, alone))
            receipt = alone.receipt()
            if length >= 64:
                mine = heads_of(after_prompt, row)
                assert kept(mine) == kept(heads_of(receipt, 0))
                assert sum(h.resident_bytes for layer in mine for h in layer) == (
                    receipt.resident_bytes
                )
            else:
                names = {h.strategy for layer in heads_of(after_prompt, row) for h in layer}
                assert names == {"whole"}
            alone = handle.new_cache()
            single = passes(llama, alone, one, whole, forced[row : row + 1])
            if length >= 64 or name == "static":  # it is long enough by now
                assert kept(heads_of(later, row)) == kept(heads_of(alone.receipt(), 0))
            errors = (together[row] - single[0]).abs().amax(dim=1)
            unavoidable = (dense_alone(llama, one, forced[row]) - dense[row]).abs().max()
            close = max(5 * unavoidable, 1e-4 * single.abs().max())
            assert errors[0] <= close
            if fetch == "unlimited":  # a selection that a near tie flips shows in single steps
                assert errors.sort().values[-4] <= close
                assert errors.max() <= 1e-2 * single.abs().max()


def hkvprof_free(model: Any) -> Any:
    """A cache of transformers, for the model as it is."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.config)


def dense_alone(model: Any, ids: Tensor, forced: Tensor) -> Tensor:
    """Under `apply`, at the whole budget: bit for bit the model's own."""
    plain = random_llama()
    plain.load_state_dict(model.state_dict())
    return passes(plain, hkvprof_free(plain), ids, torch.ones_like(ids), forced[None])[0]


def test_a_row_that_grows_long_enough_is_compressed_as_alone(llama: Any) -> None:
    ids, mask = left_padded([200, 50])
    forced = token_ids(2, 70, seed=3)
    options: dict[str, Any] = {"budget": 0.4, "min_tokens": 100, "compress_every": 30}
    with apply(llama, profile_of(llama, "mixed"), **options) as handle:
        batch, alone = handle.new_cache(), handle.new_cache()
        together = passes(llama, batch, ids, mask, forced)
        single = passes(llama, alone, ids[1:, -50:], mask[1:, -50:], forced[1:])
        assert batch.receipt().layers[0].reason == ""
        assert alone.receipt().compressed_layers == 3
        assert kept(heads_of(batch.receipt(), 1)) == kept(heads_of(alone.receipt(), 0))
    assert (together[1] - single[0]).abs().max() <= 1e-4 * single.abs().max()


@pytest.mark.parametrize("name", PROFILES)
def test_rows_in_chunks_and_reordered(llama: Any, name: str) -> None:
    ids, mask = left_padded(LENGTHS)
    order = [2, 0, 1, 1]
    forced = token_ids(4, 30, seed=3)
    full = mask
    with apply(llama, made(llama, name), budget=0.3) as handle:
        whole, parts = handle.new_cache(), handle.new_cache(prompt_tokens=400)
        expected = passes(llama, whole, ids, mask, forced)
        for begin in range(0, 400, 96):
            end = min(400, begin + 96)
            some = {"attention_mask": mask[:, :end], "position_ids": places(mask)[:, begin:end]}
            llama(input_ids=ids[:, begin:end], **some, **with_cache(llama, parts))
        parts.reorder_cache(torch.tensor(order))
        assert measure_storage(parts)[0] == parts.receipt().resident_bytes
        for step in range(30):
            full = torch.cat([full, full.new_ones(4, 1)], dim=1)
            out = llama(
                input_ids=forced[order, step : step + 1],
                attention_mask=full[order],
                position_ids=places(full[order])[:, -1:],
                **with_cache(llama, parts),
            ).logits[:, -1]
            close = expected[order, step + 1]
            assert (out - close).abs().max() <= 1e-4 * close.abs().max()
        for row, source in enumerate(order[:3]):
            mine, theirs = heads_of(parts.receipt(), row), heads_of(whole.receipt(), source)
            assert [one[:4] for one in kept(mine)] == [one[:4] for one in kept(theirs)]


def test_bytes_are_for_the_whole_batch(llama: Any) -> None:
    """Rows that stay dense have theirs; the others get one share of what they hold, for ever."""
    ids, mask = left_padded(LENGTHS)
    unit = 3 * 2 * 2 * 16 * 4
    budget = 200 * 1024
    with apply(llama, profile_of(llama, "static"), budget=f"{budget}B") as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, attention_mask=mask, **with_cache(llama, cache))
        receipt = cache.receipt()
        ends = 8 * 3 * 2 * 4
        assert budget - 4 * unit <= receipt.resident_bytes <= budget + ends
        bytes_of = [
            sum(h.resident_bytes for x in heads_of(receipt, r) for h in x) for r in range(4)
        ]
        assert bytes_of[1] == 40 * unit + ends // 4
        shares = [bytes_of[row] / (LENGTHS[row] * unit) for row in (0, 2, 3)]
        assert max(shares) - min(shares) < 2 / 150
        passes_of_one = token_ids(4, 60, seed=2)
        for one in passes_of_one.split(1, dim=1):
            mask = torch.cat([mask, torch.ones_like(one)], dim=1)
            llama(input_ids=one, attention_mask=mask, **with_cache(llama, cache))
            assert cache.receipt().resident_bytes <= 1.05 * budget + 4 * 6.4 * unit
    with (
        apply(llama, profile_of(llama, "static"), budget=f"{39 * unit}B") as handle,
        pytest.raises(
            BudgetError, match=r"row 0, a prompt of 400 tokens: the rows that stay dense"
        ),
    ):
        llama(input_ids=ids, attention_mask=left_padded(LENGTHS)[1])


def test_a_budget_that_does_not_fit_one_row_names_it(llama: Any) -> None:
    ids, mask = left_padded([400, 70])
    profile = profile_of(llama, "dynamic")
    with (
        apply(llama, profile, budget=0.3) as handle,
        pytest.raises(BudgetError, match=r"row 1, a prompt of 70 tokens: budget 0\.3 gives"),
    ):
        llama(input_ids=ids, attention_mask=mask)
    with apply(llama, profile, budget=0.3, strict=False) as handle:
        llama(input_ids=ids, attention_mask=mask)
        receipt = handle.receipt()
    assert receipt.compressed_layers == 3
    assert receipt.layers[0].reason.startswith("row 1, a prompt of 70 tokens: budget 0.3 gives")
    assert "dense because row 1" in str(receipt)


@torch.no_grad()
def test_prompts_of_tinyvl_in_a_batch_answer_as_alone() -> None:
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    samples = [
        make_sample("find", number, images=images, split="heldout")
        for number, images in enumerate((12, 2, 6))
    ]
    kinds = {"max_new_tokens": 8, "do_sample": False}
    encoded = processor.encode([sample.messages for sample in samples])
    with hkvprof.runtime.apply(model, FOLDER / "tinyvl.hkv.safetensors", budget=0.2) as handle:
        together = model.generate(**encoded.to(model.device, model.dtype), **kinds)
        receipt = handle.receipt()
        for row, sample in enumerate(samples):
            one = processor.encode([sample.messages])
            alone = model.generate(**one.to(model.device, model.dtype), **kinds)
            found = together[row, encoded.tokens :][: alone.shape[1] - one.tokens]
            assert torch.equal(found, alone[0, one.tokens :])
            if one.tokens >= 256:
                assert (
                    kept(heads_of(receipt, row))[0][:2]
                    == kept(heads_of(handle.receipt(), 0))[0][:2]
                )
