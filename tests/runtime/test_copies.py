"""Copies of a cache in use: every branch is what a fresh run of that branch gives."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import CompressionError
from hkvprof.models.calls import with_cache
from hkvprof.runtime import measure_storage
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import apply, left_padded, random_llama, token_ids
from tests.runtime.queues import InOrder
from tests.runtime.test_handle import TYPES, profile_of

torch.set_num_threads(1)
ROWS = 2
CLOCKS = ("compression_seconds", "retrieval_seconds")
OPTIONS: list[dict[str, Any]] = [
    {"budget": 0.3, "compress_every": 9},
    {"budget": 0.4, "compress_every": 9, "host_dtype": "int8"},
    {"budget": 0.3, "compress_every": 0},
    {"budget": 1.0},
    {"budget": 0.3, "min_tokens": 175, "compress_every": 15},
]


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()


@dataclass
class Branch:
    """A conversation and all that was done to it."""

    cache: Any
    mask: Tensor
    done: list[tuple[Any, ...]] = field(default_factory=list)

    def fork(self) -> Branch:
        return Branch(copy.deepcopy(self.cache), self.mask, list(self.done))


@torch.no_grad()
def act(model: Any, branch: Branch, what: tuple[Any, ...]) -> Tensor | None:
    """Do one thing to a conversation; the logits, where it is a pass."""
    branch.done.append(what)
    kind, *rest = what
    if kind == "reorder":
        branch.cache.reorder_cache(torch.tensor(rest[0]))
        branch.mask = branch.mask[rest[0]]
        return None
    if kind == "prompt":
        ids, branch.mask = left_padded(rest[0])
    else:
        ids = token_ids(ROWS, rest[0], seed=rest[1])
        branch.mask = torch.cat([branch.mask, torch.ones_like(ids)], dim=1)
    out = model(input_ids=ids, attention_mask=branch.mask, **with_cache(model, branch.cache))
    if kind == "guess":
        branch.cache.crop(-(rest[0] - 1))
        branch.mask = branch.mask[:, : 1 - rest[0]]
    return out.logits


def account(cache: Any) -> Any:
    """A receipt without clocks and without host bytes: a shared store is copied without slack."""
    receipt = cache.receipt()
    layers = [asdict(layer) for layer in receipt.layers]
    for layer in layers:
        for head in layer["heads"]:
            del head["host_bytes"]
        for clock in CLOCKS:
            del layer[clock]
    return receipt.resident_bytes, receipt.peak_bytes, layers


def check(model: Any, new_cache: Callable[[], Any], branch: Branch) -> None:
    """One more step gives what the same history gives on a cache of its own, receipt included."""
    fresh = Branch(new_cache(), torch.empty(0))
    for what in branch.done:
        act(model, fresh, what)
    assert account(branch.cache) == account(fresh.cache)
    receipt = branch.cache.receipt()
    assert measure_storage(branch.cache) == (receipt.resident_bytes, receipt.host_bytes)
    last = ("turn", 1, 99)
    got, expected = act(model, branch, last), act(model, fresh, last)
    assert got is not None
    assert expected is not None
    assert torch.equal(got, expected)


acts = st.one_of(
    st.tuples(st.just("turn"), st.just(1), st.integers(0, 9)),
    st.tuples(st.just("turn"), st.integers(2, 30), st.integers(0, 9)),
    st.tuples(st.just("guess"), st.integers(2, 4), st.integers(0, 9)),
    st.tuples(st.just("reorder"), st.sampled_from([[1, 0], [0, 0], [1, 1]])),
)
LENGTHS = [[150, 131], [150, 150]]


@settings(max_examples=20, deadline=None)
@given(
    types=st.sampled_from(TYPES),
    options=st.sampled_from(OPTIONS),
    lengths=st.sampled_from(LENGTHS),
    steps=st.lists(st.tuples(st.integers(0, 3), st.booleans(), acts), min_size=1, max_size=10),
)
def test_every_branch_is_a_fresh_run_of_that_branch(
    llama: Any, types: str, options: dict[str, Any], lengths: list[int], steps: list[Any]
) -> None:
    """Passes, cuts and reorderings on a growing tree of copies."""
    with apply(llama, profile_of(llama, types), **options) as handle:
        branches = [Branch(handle.new_cache(), torch.empty(0))]
        act(llama, branches[0], ("prompt", lengths))
        for number, forks, what in steps:
            branch = branches[number % len(branches)]
            if forks:
                branches.append(branch.fork())
            act(llama, branch, what)
        for branch in branches:
            check(llama, handle.new_cache, branch)


@pytest.mark.parametrize("types", TYPES)
def test_a_cache_is_copied_before_its_prompt_and_between_its_chunks(llama: Any, types: str) -> None:
    ids = token_ids(1, 150)
    with apply(llama, profile_of(llama, types), budget=0.3) as handle, torch.no_grad():

        def finish(cache: Any, rest: Tensor) -> Tensor:
            llama(input_ids=rest, **with_cache(llama, cache))
            assert cache.receipt().compressed_layers == 3
            return llama(input_ids=ids[:, :1], **with_cache(llama, cache)).logits

        caches = [handle.new_cache(150) for _ in range(3)]
        empty = copy.deepcopy(caches[0])
        for cache in [*caches, empty]:
            llama(input_ids=ids[:, :70], **with_cache(llama, cache))
        waiting = copy.deepcopy(caches[0])
        assert measure_storage(waiting) == measure_storage(caches[0])
        other = token_ids(1, 80, seed=5)
        expected = [finish(caches[1], ids[:, 70:]), finish(caches[2], other)]
        assert torch.equal(finish(waiting, other), expected[1])
        assert torch.equal(finish(caches[0], ids[:, 70:]), expected[0])
        assert torch.equal(finish(empty, other), expected[1])


def test_containers_keep_who_is_who(llama: Any) -> None:
    with apply(llama, profile_of(llama, "mixed"), budget=0.3) as handle, torch.no_grad():
        cache = handle.new_cache()
        llama(input_ids=token_ids(1, 140), **with_cache(llama, cache))
        both = copy.deepcopy({"a": cache, "b": [cache, cache.layers[1]]})
        assert both["a"] is both["b"][0]
        assert both["a"].layers[1] is both["b"][1]
        assert both["a"].covered[1] is both["b"][1]
        assert both["a"] is not cache
        assert both["a"].conversation.planner is cache.conversation.planner
        assert both["a"].books.meter is not cache.books.meter
        for layer in both["a"].covered:
            assert layer._shared is both["a"].conversation


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("layer", [False, True])
def test_no_copy_shares_what_changes(llama: Any, make: Callable[[Any], Any], layer: bool) -> None:
    """What is done to copies, of layers alone too, leaves the original as it was."""
    ids = token_ids(1, 140)
    with apply(llama, profile_of(llama, "mixed"), budget=0.3) as handle, torch.no_grad():
        cache, fresh = handle.new_cache(), handle.new_cache()
        for one in (cache, fresh):
            llama(input_ids=ids, **with_cache(llama, one))
        if layer:
            copies = [make(one) for one in cache.layers]
            for one in copies:
                one.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16))
                one.reset()
        else:
            other = make(cache)
            llama(input_ids=ids[:, :3], **with_cache(llama, other))
            other.reset()
        assert account(cache) == account(fresh)
        step = ids[:, 5:6]
        got, expected = (
            llama(input_ids=step, **with_cache(llama, one)).logits for one in (cache, fresh)
        )
    assert torch.equal(got, expected)


def test_a_copy_holds_no_second_copy_of_host_items_before_either_grows(llama: Any) -> None:
    ids = token_ids(1, 140)
    with apply(llama, profile_of(llama, "dynamic"), budget=0.3, compress_every=20) as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, **with_cache(llama, cache))
        other = copy.deepcopy(cache)

        def host(one: Any) -> Tensor:
            return one.covered[0].ragged.dynamic[0].host.data

        assert host(cache) is host(other)
        before = host(cache).clone()
        llama(input_ids=ids[:, :40], **with_cache(llama, other))
        llama(input_ids=ids[:, :1], **with_cache(llama, other))  # the turn goes to the host
        assert host(cache) is not host(other)
        assert torch.equal(host(cache), before)


def test_a_monitored_cache_and_its_copy_are_judged_apart() -> None:
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    prompts = [
        processor.encode([make_sample("find", i, images=8, split="calibration").messages]).to(
            model.device, model.dtype
        )
        for i in range(2)
    ]
    with apply(model, "profiles/tinyvl.hkv.safetensors", budget=0.3, monitor=1.0) as handle:
        cache = handle.new_cache()
        copies = [copy.deepcopy(cache), cache]
        for one, inputs in zip(copies, prompts, strict=True):
            model(**inputs, **with_cache(model, one))
        found = [one.receipt().domain for one in copies]
        fresh = []
        for inputs in prompts:
            model(**inputs, **with_cache(model, one := handle.new_cache()))
            fresh.append(one.receipt().domain)
    assert found == fresh
    assert found[0] != found[1]


@pytest.mark.parametrize("steps", [0, 3])
def test_pickling_says_what_to_do(llama: Any, steps: int) -> None:
    ids = token_ids(1, 140)
    with apply(llama, profile_of(llama, "mixed"), budget=0.3) as handle, torch.no_grad():
        cache = handle.new_cache()
        llama(input_ids=ids, **with_cache(llama, cache))
        for step in range(steps):
            llama(input_ids=ids[:, step : step + 1], **with_cache(llama, cache))
        for one in (cache, {"cache": cache}, cache.layers, [cache.layers[0].ragged]):
            with pytest.raises(CompressionError, match=r"copy\.deepcopy\(cache\)"):
                pickle.dumps(one)
            with pytest.raises(CompressionError, match="Save the token ids"):
                torch.save(one, io.BytesIO())


def test_prefetch_goes_on_from_the_last_query(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is part of a copy: attention would else see a newer selection than a fresh run."""
    from hkvprof.runtime import handle as handles
    from hkvprof.runtime import retrieval as retrieving

    monkeypatch.setattr(retrieving, "queues_for", lambda device: InOrder())
    monkeypatch.setattr(handles, "queues_for", lambda device: InOrder())
    ids = token_ids(1, 140)
    profile = uniform_profile(llama, "dynamic", index="mean", chunk=4)
    with apply(llama, profile, budget=0.3, prefetch=0.3) as handle, torch.no_grad():

        def steps(cache: Any, start: int) -> Tensor:
            return torch.cat(
                [
                    llama(input_ids=ids[:, i : i + 1], **with_cache(llama, cache)).logits
                    for i in range(start, start + 6)
                ]
            )

        first, second = handle.new_cache(), handle.new_cache()
        for cache in (first, second):
            llama(input_ids=ids, **with_cache(llama, cache))
            steps(cache, 0)
        other = copy.deepcopy(first)
        steps(first, 40)
        assert torch.equal(steps(other, 10), steps(second, 10))
