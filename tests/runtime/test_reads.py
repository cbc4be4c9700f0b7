"""What decoding steps read from host memory: never more than the budget, and told as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hkvprof.errors import BudgetError
from hkvprof.profile.costs import DynamicLayout, most_read_bytes, read_bytes
from hkvprof.runtime.receipt import Receipt
from hkvprof.runtime.storage import DynamicHead, HostChunks
from tests.models_for_tests import apply, left_padded, random_llama, token_ids
from tests.runtime.test_forecast import MENUS, measured
from tests.runtime.test_handle import profile_of

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()


def dense_bytes(model: Any, tokens: int) -> int:
    return tokens * measured(model, MENUS["static"]).grid.token_bytes(4)


def heads(cache: Any) -> list[DynamicHead]:
    return [head for layer in cache.layers for head in layer.state.dynamic.values()]


@pytest.mark.parametrize("fetch", [0.0, 0.004, 0.02, "6KiB", None, "unlimited"])
@pytest.mark.parametrize("options", [{}, {"host_dtype": "int8"}, {"smoothing": 0.0}], ids=str)
@torch.no_grad()
def test_every_step_keeps_to_the_budget(llama: Any, fetch: Any, options: dict[str, Any]) -> None:
    """Steps at which the tail joins too; by the counts of every step, not by the limit alone."""
    tokens = 700
    profile = measured(llama, MENUS["all"], seed=3)
    with apply(llama, profile, 0.2, fetch=fetch, compress_every=20, **options) as handle:
        cache = handle.new_cache()
        llama(input_ids=token_ids(1, tokens), past_key_values=cache)
        assert cache.receipt().bytes_moved == 0
        before, most = 0, 0
        for one in token_ids(1, 70, seed=2).split(1, dim=1):
            llama(input_ids=one, past_key_values=cache)
            receipt = cache.receipt()
            read, before = receipt.bytes_moved - before, receipt.bytes_moved
            most = max(most, read)
            assert read <= receipt.limit_bytes
    if fetch == "6KiB":
        assert receipt.limit_bytes <= 6 * 1024
    elif isinstance(fetch, float):
        assert receipt.limit_bytes <= fetch * dense_bytes(llama, tokens)
    assert most <= receipt.most_bytes <= receipt.limit_bytes
    assert receipt.bytes_per_step == pytest.approx(receipt.bytes_moved / 70)
    assert receipt.pass_bytes == 0
    assert (receipt.host_bytes == 0) == (fetch == 0.0) == (most == 0)
    assert max(layer.compressions for layer in receipt.layers) >= 3


@torch.no_grad()
def decoded(model: Any, profile: Any, fetch: Any, steps: int, tokens: int = 600) -> Receipt:
    """What a request read."""
    with apply(model, profile, 0.3, fetch=fetch) as handle:
        cache = handle.new_cache()
        model(input_ids=token_ids(1, tokens), past_key_values=cache)
        for one in token_ids(1, steps, seed=4).split(1, dim=1):
            model(input_ids=one, past_key_values=cache)
        receipt: Receipt = cache.receipt()
        return receipt


def test_where_less_may_be_read_than_is_wanted_less_is(llama: Any) -> None:
    """With all heads dynamic, so that nothing but the limit differs."""
    profile = profile_of(llama, "dynamic")
    less, more = (decoded(llama, profile, fetch, 40) for fetch in (0.05, "unlimited"))
    assert 0 < less.bytes_per_step < more.bytes_per_step


@torch.no_grad()
def test_passes_of_several_tokens_are_told_apart(llama: Any) -> None:
    """They read every item of every dynamic head, and count as no step."""
    with apply(llama, profile_of(llama, "dynamic"), 0.3, fetch=0.05) as handle:
        cache = handle.new_cache()
        llama(input_ids=token_ids(1, 600), past_key_values=cache)
        everything = sum(head.layout.items * head.host.item_bytes for head in heads(cache))
        llama(input_ids=token_ids(1, 5, seed=1), past_key_values=cache)
        receipt = cache.receipt()
    assert receipt.pass_bytes == everything > receipt.limit_bytes
    assert receipt.bytes_moved == receipt.bytes_per_step == 0
    assert "a step reads 0.00% of dense bytes from there and at most" in str(receipt)
    for name in ("bytes_per_step", "most_bytes", "limit_bytes", "pass_bytes", "read_share"):
        assert receipt.to_json()[name] == getattr(receipt, name)


@torch.no_grad()
def test_rows_have_a_budget_each_and_masks_change_nothing(llama: Any) -> None:
    """Padded rows are of unequal length, and a mask that hides tokens goes another way."""
    ids, mask = left_padded([600, 400, 500])
    profile = measured(llama, MENUS["projected"], seed=5)
    with apply(llama, profile, 0.25, fetch="4KiB") as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, attention_mask=mask, past_key_values=cache)
        before = 0
        for number, one in enumerate(token_ids(3, 30, seed=2).split(1, dim=1)):
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
            shown = mask.clone()
            shown[:, 300:340] = mask[:, 300:340] * (number % 2)
            llama(input_ids=one, attention_mask=shown, past_key_values=cache)
            receipt = cache.receipt()
            assert receipt.bytes_moved - before <= receipt.limit_bytes <= 3 * 4096
            before = receipt.bytes_moved
    for row in range(3):
        own = [h for layer in receipt.layers for h in layer.heads if h.row == row]
        assert sum(head.limit_bytes for head in own) <= 4096
    assert receipt.bytes_moved > 0


@torch.no_grad()
def test_joining_the_budget_reads_nothing(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with apply(llama, profile_of(llama, "dynamic"), 0.3, compress_every=16) as handle:
        cache = handle.new_cache()
        llama(input_ids=token_ids(1, 600), past_key_values=cache)

        def fetch(*_: Any) -> Any:
            raise AssertionError("a host item was read")

        monkeypatch.setattr(HostChunks, "fetch", fetch)
        for one in token_ids(1, 40, seed=4).split(1, dim=1):
            llama(input_ids=one, past_key_values=cache)
        assert max(layer.compressions for layer in cache.receipt().layers) >= 3
        for head in heads(cache):
            assert len(set(head.slots.tolist())) == head.layout.hot


@torch.no_grad()
def test_a_plan_foretells_what_a_step_may_read(llama: Any) -> None:
    profile = measured(llama, MENUS["all"], seed=7)
    for fetch in (0.01, 0.05, None):
        plan = profile.plan(0.2, 700, itemsize=4, fetch=fetch)
        with apply(llama, profile, 0.2, fetch=fetch) as handle:
            cache = handle.new_cache()
            llama(input_ids=token_ids(1, 700), past_key_values=cache)
            assert cache.receipt().limit_bytes == plan.most_read_bytes > 0


def test_too_little_for_heads_that_must_read_is_said_before_they_do(llama: Any) -> None:
    with (
        apply(llama, profile_of(llama, "dynamic"), 0.3, fetch=0) as handle,
        pytest.raises(BudgetError, match=r"its dynamic heads read at least .*: raise fetch"),
    ):
        llama(input_ids=token_ids(1, 600), past_key_values=handle.new_cache())


@pytest.mark.parametrize("growth", [1, 100, 10_000])
def test_the_limit_does_not_grow_with_the_row(growth: int) -> None:
    """Candidates and new items are numbers, whatever the index holds."""
    for rerank, hot, items in ((64, 30, 40), (8, 100, 500)):
        layout = DynamicLayout(2, 4, items * growth, 1, hot * growth)
        assert read_bytes(rerank, layout, 16, 16, 7) <= most_read_bytes(rerank, 1, 16, 16, 7)
