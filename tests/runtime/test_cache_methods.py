"""Every public name of transformers' DynamicCache and DynamicLayer: exact on a compressed cache, or
one clear sentence. A name that a later release adds fails here until it is in a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hkvprof.errors import CompressionError
from hkvprof.models.calls import with_cache
from hkvprof.runtime import measure_storage
from tests.models_for_tests import apply, random_llama, token_ids
from tests.runtime.test_handle import profile_of

torch.set_num_threads(1)
TOKENS = 140
IDS = token_ids(2, TOKENS)

Act = Callable[[Any], Any]
"""On a cache or a layer; a stock one that saw the same tokens must give the same."""

SAME: dict[str, Act] = {
    "__len__": len,
    "get_seq_length": lambda c: (c.get_seq_length(), c.get_seq_length(1)),
    "get_mask_sizes": lambda c: c.get_mask_sizes(5, 1),
    "get_query_offset": lambda c: c.get_query_offset(1),
    "get_max_length": lambda c: (c.get_max_length(), c.get_max_length(1)),
    "max_batch_size": lambda c: c.max_batch_size,
    "max_cache_len": lambda c: c.max_cache_len,
    "batch_size": lambda c: c.batch_size,
    "is_compileable": lambda c: c.is_compileable,
    "is_initialized": lambda c: c.is_initialized,
    "is_croppable": lambda c: c.is_croppable,
    "is_sliding": lambda c: c.is_sliding,
    "is_linear": lambda c: c.is_linear,
    "is_dummy": lambda c: c.is_dummy,
    "is_recording_past": lambda c: c.is_recording_past(1),
    "activate_past_recording": lambda c: c.activate_past_recording(),
    "early_initialization": lambda c: c.early_initialization(2, 2, 16, torch.float32, "cpu"),
}
SAME_ERROR: dict[str, Act] = {
    "get_conv_state": lambda c: c.get_conv_state(0),
    "update_conv_state": lambda c: c.update_conv_state(torch.ones(1), 0),
    "get_recurrent_state": lambda c: c.get_recurrent_state(0),
    "update_recurrent_state": lambda c: c.update_recurrent_state(torch.ones(1), 0),
    "update_indexer": lambda c: c.update_indexer(torch.ones(1), 0),
    "has_previous_state": lambda c: c.has_previous_state(),
    "prefetch": lambda c: c.prefetch(0),  # of a cache that was not made to be offloaded
}
REFUSED: dict[str, Act] = {
    "__iter__": list,
    "offload": lambda c: c.offload(0),
}
CHANGES: dict[str, Act] = {
    "crop": lambda c: c.crop(-3),
    "reset": lambda c: c.reset(),
    "reorder_cache": lambda c: c.reorder_cache(torch.tensor([1, 1])),
    "batch_repeat_interleave": lambda c: c.batch_repeat_interleave(2),
    "batch_select_indices": lambda c: c.batch_select_indices(torch.tensor([1])),
}
"""What changes a cache: afterwards it continues near a stock one that was changed likewise."""
IN_A_PASS: dict[str, Act] = {
    "update": lambda c: c.update(torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16), 0),
}
"""Refused but within a pass of the model that the cache was made for."""
LAYER_SAME: dict[str, Act] = {
    "get_seq_length": lambda y: y.get_seq_length(),
    "get_mask_sizes": lambda y: y.get_mask_sizes(5),
    "get_max_length": lambda y: y.get_max_length(),
    "is_compileable": lambda y: y.is_compileable,
    "is_croppable": lambda y: y.is_croppable,
    "is_sliding": lambda y: y.is_sliding,
    "supports_early_init": lambda y: y.supports_early_init,
    "is_initialized": lambda y: y.is_initialized,
    "device": lambda y: y.device,
}
LAYER_REFUSED: dict[str, Act] = {
    "keys": lambda y: y.keys,
    "values": lambda y: y.values,
    "offload": lambda y: y.offload(),
    "prefetch": lambda y: y.prefetch(),
}
LAYER_THROUGH_THE_CACHE = {
    "update", "lazy_initialization", "crop", "reset", "reorder_cache", "batch_repeat_interleave",
    "batch_select_indices",
}  # fmt: skip
PLAIN = {"layers", "layer_class_to_replicate", "offloading", "dtype", "get_max_cache_shape"}
"""Attributes as they are, and what older releases say is gone."""


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()


def names(kind: Any, made: Any) -> set[str]:
    """Public names, and the special methods that transformers itself defines."""
    own: set[str] = set(vars(made))
    for parent in kind.__mro__[:-1]:
        if parent.__module__.startswith("transformers"):
            own |= set(vars(parent))
    special = {"__len__", "__iter__", "__getitem__", "__contains__"}
    return {name for name in own if not name.startswith("_")} | (own & special)


def filled(llama: Any, cache: Any) -> Any:
    for ids in (IDS, IDS[:, :4]):
        llama(input_ids=ids, **with_cache(llama, cache))
    return cache


def stock(llama: Any) -> Any:
    return filled(llama, DynamicCache(config=llama.config))


def test_the_tables_name_all_there_is(llama: Any) -> None:
    cache, layer = DynamicCache(config=llama.config), DynamicLayer()
    layer.lazy_initialization(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    told = {*SAME, *SAME_ERROR, *REFUSED, *CHANGES, *IN_A_PASS, *PLAIN}
    assert names(DynamicCache, cache) <= told
    told = {*LAYER_SAME, *LAYER_REFUSED, *LAYER_THROUGH_THE_CACHE, *PLAIN}
    assert names(DynamicLayer, layer) <= told


def has(kind: Any, name: str) -> None:
    if not hasattr(kind, name):
        pytest.skip("not in this release")


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # whatever transformers has
@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_answers_as_a_stock_cache_does(llama: Any, name: str) -> None:
    has(DynamicCache, name)
    with apply(llama, profile_of(llama, "mixed"), budget=0.3) as handle:
        cache = filled(llama, handle.new_cache())
        assert cache.receipt().compressed_layers == 3
        handle.detach()
        assert SAME[name](cache) == SAME[name](stock(llama))


@pytest.mark.parametrize("name", SAME_ERROR)
@torch.no_grad()
def test_fails_as_a_stock_cache_does(llama: Any, name: str) -> None:
    with apply(llama, profile_of(llama, "mixed"), budget=0.3) as handle:
        cache = filled(llama, handle.new_cache())
        handle.detach()
        with pytest.raises((ValueError, AttributeError)) as expected:
            SAME_ERROR[name](stock(llama))
        with pytest.raises(type(expected.value)) as found:
            SAME_ERROR[name](cache)
    assert str(found.value).replace("Compressed", "Dynamic") == str(expected.value)


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_is_refused_in_one_sentence_while_compressed(llama: Any, name: str) -> None:
    with apply(llama, profile_of(llama, "mixed"), budget=0.3) as handle:
        cache = filled(llama, handle.new_cache())
        with pytest.raises(CompressionError, match=r"layer 0 is compressed.*receipt"):
            REFUSED[name](cache)
        with pytest.raises(CompressionError, match="layer 0 is compressed"):
            DynamicCache(cache)  # would be empty


@pytest.mark.parametrize("name", LAYER_SAME)
@torch.no_grad()
def test_a_layer_answers_as_a_stock_layer_does(llama: Any, name: str) -> None:
    with apply(llama, profile_of(llama, "mixed"), budget=0.3) as handle:
        cache = filled(llama, handle.new_cache())
        handle.detach()
        act, dense = LAYER_SAME[name], stock(llama).layers[1]
        has(dense, name)
        assert act(cache.layers[1]) == act(dense)


@pytest.mark.parametrize("name", LAYER_REFUSED)
@torch.no_grad()
def test_a_layer_refuses_in_one_sentence_while_compressed(llama: Any, name: str) -> None:
    with apply(llama, profile_of(llama, "mixed"), budget=0.3) as handle:
        cache = filled(llama, handle.new_cache())
        with pytest.raises(CompressionError, match=r"layer 1 is compressed.*measure_storage"):
            LAYER_REFUSED[name](cache.layers[1])
        assert measure_storage(cache)[0] == cache.receipt().resident_bytes
        waiting = handle.new_cache(2 * TOKENS)
        llama(input_ids=IDS, **with_cache(llama, waiting))
        with pytest.raises(CompressionError, match="layer 1 waits on the host"):
            LAYER_REFUSED[name](waiting.layers[1])


@pytest.mark.parametrize("name", [*REFUSED, *LAYER_REFUSED])
@torch.no_grad()
def test_dense_layers_answer_all_of_it(llama: Any, name: str) -> None:
    """At budget 1.0 the cache is a DynamicCache in every way."""
    with apply(llama, profile_of(llama, "mixed"), budget=1.0) as handle:
        cache = filled(llama, handle.new_cache())
        handle.detach()
        dense = stock(llama)
        if name in LAYER_REFUSED:
            got, expected = (LAYER_REFUSED[name](one.layers[1]) for one in (cache, dense))
        else:
            got, expected = (REFUSED[name](one) for one in (cache, dense))
        assert flat(got) == flat(expected)
        assert flat(list(DynamicCache(list(cache)))) == flat(list(dense))


@pytest.mark.parametrize("name", IN_A_PASS)
@torch.no_grad()
def test_takes_tokens_from_its_model_alone(llama: Any, name: str) -> None:
    with apply(llama, profile_of(llama, "mixed"), budget=0.3) as handle:
        cache = filled(llama, handle.new_cache())
        with pytest.raises(CompressionError, match="call that model itself"):
            IN_A_PASS[name](cache)
        assert cache.get_seq_length() == TOKENS + 4


def flat(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return [flat(one) for one in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("budget", [0.3, 1.0])
@torch.no_grad()
def test_goes_on_as_a_stock_cache_does(llama: Any, name: str, budget: float) -> None:
    """Of dynamic heads a pass of several tokens sees everything."""
    with apply(llama, profile_of(llama, "dynamic"), budget=budget) as handle:
        cache = filled(llama, handle.new_cache())
        CHANGES[name](cache)
        rows = {"batch_repeat_interleave": 4, "batch_select_indices": 1}.get(name, 2)
        turn = token_ids(rows, 3, seed=8)
        got = llama(input_ids=turn, **with_cache(llama, cache)).logits
        receipt = cache.receipt()
        assert measure_storage(cache) == (receipt.resident_bytes, receipt.host_bytes)
        handle.detach()
        if name == "reset":  # 5.16 fills with zeros in place and goes on from them
            dense = DynamicCache(config=llama.config)
        else:
            dense = stock(llama)
            CHANGES[name](dense)
        expected = llama(input_ids=turn, **with_cache(llama, dense)).logits
    if budget == 1:
        assert torch.equal(got, expected)
    else:
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_attributes_of_former_releases_are_no_attributes(llama: Any) -> None:
    with apply(llama, profile_of(llama, "mixed"), budget=0.3) as handle:
        cache = filled(llama, handle.new_cache())
        for name in ("key_cache", "value_cache", "to_legacy_cache", "batch_split", "seen_tokens"):
            with pytest.raises(AttributeError, match=name):
                getattr(cache, name)
        with pytest.raises(TypeError, match="subscriptable"):
            cache[0]
