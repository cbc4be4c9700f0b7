"""Continuations are scored as a dense pass does at full budget, as decoding does below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import SampleError
from hkvprof.models.calls import with_cache
from hkvprof.plugins.requests import Pair, Score, batches, score
from hkvprof.plugins.session import compressed_rows
from tests.models_for_tests import apply, random_llama, token_ids

torch.set_num_threads(1)


def pair(context: int, continuation: int, seed: int = 0, shared: int = 0) -> Pair:
    """A context that depends on length and `shared` alone."""
    return Pair(
        tuple(token_ids(1, context, seed=100 + shared)[0].tolist()),
        tuple(token_ids(1, continuation, seed=seed)[0].tolist()),
    )


@torch.no_grad()
def in_one_pass(model: Any, wanted: Pair) -> Score:
    """The plain model on context and continuation together."""
    ids = torch.tensor([wanted.context + wanted.continuation])
    chances = model(ids).logits[0, len(wanted.context) - 1 : -1].log_softmax(-1)
    targets = ids[0, len(wanted.context) :]
    total = chances.gather(-1, targets[:, None]).sum()
    return Score(float(total), bool((chances.argmax(-1) == targets).all()))


@torch.no_grad()
def by_hand(model: Any, new_cache: Callable[[int], Any], wanted: Pair, last: int = 1) -> float:
    """Prefill, then the continuation; `last` tokens in each pass."""
    cache = new_cache(len(wanted.context))
    logits = model(torch.tensor([wanted.context]), **with_cache(model, cache)).logits[:, -1:]
    fed = torch.tensor([wanted.continuation[:-1]])
    for begin in range(0, fed.shape[1], last):
        piece = fed[:, begin : begin + last]
        more = model(piece, **with_cache(model, cache)).logits
        logits = torch.cat([logits, more], dim=1)
    chances = logits[0].log_softmax(-1)
    return float(chances.gather(-1, torch.tensor(wanted.continuation)[:, None]).sum())


def profile_of(model: Any, types: str) -> Any:
    if types != "mixed":
        return uniform_profile(model, types, chunk=8)
    shape = uniform_profile(model).strategy.shape
    mixed = torch.arange(shape[0] * shape[1]).view(shape).numpy() % 2
    return uniform_profile(model, mixed, chunk=8)


def test_full_budget_scores_as_one_dense_pass() -> None:
    model = random_llama()
    pairs = [pair(90, 5), pair(90, 9, 1), pair(70, 1, 2), pair(3, 4, 3), pair(1, 7, 4)]
    expected = [in_one_pass(model, wanted) for wanted in pairs]
    with apply(model, uniform_profile(model), budget=1.0) as handle:
        found, receipt = score(model, handle.new_cache, pairs)
    assert [s.logprob for s in found] == pytest.approx([s.logprob for s in expected], abs=1e-4)
    assert [s.greedy for s in found] == [s.greedy for s in expected]
    assert compressed_rows(receipt) == []


def test_what_greedy_decoding_writes_is_greedy() -> None:
    model = random_llama()
    context = pair(150, 1).context
    with apply(model, profile_of(model, "mixed"), budget=0.25) as handle:
        ids = torch.tensor([context])
        output = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=64)
        written = tuple(output[0, 150:].tolist())
        wrong = (*written[:-1], (written[-1] + 1) % 64)
        found, _ = score(model, handle.new_cache, [Pair(context, written), Pair(context, wrong)])
    assert [s.greedy for s in found] == [True, False]


@pytest.mark.parametrize("types", ["static", "dynamic", "mixed"])
def test_compressed_scores_are_those_of_decoding(types: str) -> None:
    """Two contexts, one of them of three continuations, which outlast a later compression."""
    model = random_llama()
    pairs = [pair(150, 20), pair(150, 2, 1), pair(150, 11, 2), pair(150, 7, 3, shared=1)]
    dense = [in_one_pass(model, wanted).logprob for wanted in pairs]
    with apply(model, profile_of(model, types), budget=0.25, compress_every=8) as handle:
        expected = [by_hand(model, handle.new_cache, wanted) for wanted in pairs]
        found, receipt = score(model, handle.new_cache, pairs)
    assert [s.logprob for s in found] == pytest.approx(expected, abs=1e-3)
    assert found[0].logprob != pytest.approx(dense[0], abs=1e-1)
    assert compressed_rows(receipt) == [True] * 4


def test_passes_of_several_tokens_would_hide_dynamic_heads() -> None:
    model = random_llama()
    wanted = pair(150, 20)
    with apply(model, profile_of(model, "dynamic"), budget=0.25) as handle:
        found, _ = score(model, handle.new_cache, [wanted])
        at_once = by_hand(model, handle.new_cache, wanted, last=32)
    dense = in_one_pass(model, wanted).logprob
    assert at_once == pytest.approx(dense, abs=1e-3)
    assert found[0].logprob != pytest.approx(dense, abs=1e-1)


def test_contexts_are_cut_from_the_left() -> None:
    assert Pair.fit([1, 2, 3], [4, 5], 8) == Pair((1, 2, 3), (4, 5))
    assert Pair.fit([1, 2, 3], [4, 5], 3) == Pair((2, 3), (4, 5))
    assert Pair.fit([1, 2, 3], [4, 5], 2) == Pair((3,), (4, 5))


@pytest.mark.parametrize(("context", "wanted"), [([1, 2], []), ([], [1]), ([1], [1, 2, 3])])
def test_pairs_that_cannot_be_scored(context: list[int], wanted: list[int]) -> None:
    with pytest.raises(SampleError, match="expected"):
        Pair.fit(context, wanted, 2)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), max_size=30), st.integers(1, 5))
def test_batches_hold_every_pair_once_and_never_mix_short_with_long(
    lengths: list[tuple[int, int]], size: int
) -> None:
    pairs = [Pair((1,) * context, (2,) * wanted) for context, wanted in lengths]
    found = list(batches(pairs, size, min_tokens=5))
    assert sorted(i for batch in found for i in batch) == list(range(len(pairs)))
    for batch in found:
        assert 0 < len(batch) <= size
        assert len({len(pairs[i].context) < 5 for i in batch}) == 1
