"""What holds for every method: equal bytes, no waste, the same answer every time."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hkvprof
from hkvprof.errors import UsageError
from hkvprof.evaluate.baselines import PromptView, baselines, find
from hkvprof.evaluate.baselines.base import Kept, Selection
from hkvprof.evaluate.baselines.session import applied, decide, fill
from hkvprof.evaluate.counting import count_bytes
from hkvprof.evaluate.prefill import Prefill, capture
from hkvprof.models.calls import with_cache
from hkvprof.profile.record import Profile, load_profile
from hkvprof.runtime.plan import HeadPlan
from hkvprof.testbed.generator import make_sample
from tests.evaluate.baselines.synthetic import counts, random_prompt

torch.set_num_threads(1)

ALL = sorted(baselines())
PLANNING = {"quest", "hybridkv", "hybridkv_offline", "all_static", "all_dynamic", "no_head_level",
            "no_type_level"}  # fmt: skip
"""Methods that (also) answer with strategies of the runtime."""
SELECTING = (
    "streaming_llm", "snapkv", "snapkv_max", "pyramidkv", "adakv", "chunkkv", "keydiff",
    "expected_attention", "look_m", "madakv", "triattention", "random",
)  # fmt: skip
"""Methods that need nothing but queries, keys and values."""
Subject = tuple[Any, Prefill, Profile]
CODED = {"kivi_int8", "kivi_int4", "kivi_int2", "snapkv_int4", "rdkv", "kvtc"}
"""Methods whose tokens take fewer bytes than they have here."""
SHARES = (0.2, 0.1, 0.05)
WHOLE = {"kivi_int8": 0.7, "kivi_int4": 0.45, "kivi_int2": 0.3}
"""What methods need that keep every token, of bytes in 16 bits."""


def shares_of(name: str) -> tuple[float, ...]:
    return (WHOLE[name],) if name in WHOLE else SHARES


def viewed(subject: Subject, name: str, share: float, **more: Any) -> PromptView:
    """Elements of coded methods count what they take in 16 bits."""
    model, prefill, profile = subject
    return PromptView(
        model, prefill, share, profile, counted_itemsize=2 if name in CODED else None,
        calibration=lambda: [prefill], **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def subject() -> Subject:
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    sample = make_sample("list", 1, images=12, split="calibration")
    prefill = capture(model, processor.encode([sample.messages]))
    return model, prefill, load_profile("profiles/tinyvl.hkv.safetensors")


def same(first: Selection, second: Selection) -> bool:
    """Whether two selections are equal to the bit."""
    return all(
        torch.equal(a.key, b.key) and torch.equal(a.value, b.value)
        if isinstance(a, Kept) and isinstance(b, Kept)
        else a == b
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@torch.no_grad()
@pytest.mark.parametrize(("name", "share"), [(n, s) for n in ALL for s in shares_of(n)])
def test_bytes_stay_within_the_share_and_decoding_works(
    subject: Subject, name: str, share: float
) -> None:
    model, prefill, profile = subject
    selected = decide(find(name), viewed(subject, name, share))
    with applied(model, find(name), share, profile) as handle:
        cache = handle.new_cache(prefill.tokens)
        fill(cache, prefill, selected)
        held = count_bytes(cache, selected.saved, selected.itemsize)
        token = prefill.logits.argmax(-1, keepdim=True)
        logits = [model(input_ids=token, **with_cache(model, cache)).logits for _ in range(2)]
    assert held.storage <= share * held.dense + 16 * prefill.view.grid.total
    assert held.resident > 0.5 * share * held.dense
    assert bool(torch.isfinite(torch.cat(logits)).all())


@pytest.mark.parametrize("name", ALL)
def test_same_selection_again_and_from_a_warm_memo(subject: Subject, name: str) -> None:
    memo: dict[str, tuple[Any, float]] = {}
    shares = shares_of(name)
    warm = [
        decide(find(name), viewed(subject, name, share, memo=memo)).selection for share in shares
    ]
    for share, selection in zip(shares, warm, strict=True):
        again = decide(find(name), viewed(subject, name, share, memo=memo)).selection
        fresh = decide(find(name), viewed(subject, name, share)).selection
        assert same(selection, fresh)
        assert same(selection, again)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", sorted(set(ALL) - PLANNING - CODED))
def test_pruning_methods_use_their_room(subject: Subject, name: str, share: float) -> None:
    model, prefill, profile = subject
    prompt = PromptView(model, prefill, share, profile)
    total = sum(map(sum, counts(decide(find(name), prompt).selection)))
    room = prompt.room * prompt.grid.total
    assert 0.95 * room <= total <= room


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(5, 90),
    share=st.floats(0.02, 0.95),
    layers=st.integers(1, 3),
)
def test_random_prompts(seed: int, tokens: int, share: float, layers: int) -> None:
    for name in SELECTING:
        prompt = random_prompt(seed, tokens, share, layers)
        selection = decide(find(name), prompt).selection
        numbers = counts(selection)
        room = prompt.room * prompt.grid.total
        assert 0.95 * room <= sum(map(sum, numbers)) <= room, name
        assert max(map(max, numbers)) <= tokens, name
        kept = [choice for layer in selection for choice in layer if isinstance(choice, Kept)]
        assert all(bool(torch.isfinite(x.key).all() & torch.isfinite(x.value).all()) for x in kept)
        assert same(
            selection, decide(find(name), random_prompt(seed, tokens, share, layers)).selection
        )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(5, 90), share=st.floats(0.02, 0.95))
def test_hybridkv_stays_within_its_share_on_random_prompts(
    seed: int, tokens: int, share: float
) -> None:
    prompt = random_prompt(seed, tokens, share)
    choices = [c for layer in decide(find("hybridkv"), prompt).selection for c in layer]
    ratios = [c.ratio if isinstance(c, HeadPlan) else len(c.key) / tokens for c in choices]
    floor = max(share, 1 / tokens)
    assert sum(ratios) <= floor * len(choices) * (1 + 1e-6)


def test_time_from_the_memo_and_offline_time() -> None:
    prompt = random_prompt(0, 20, 0.5)

    def slow() -> int:
        torch.randn(400, 400) @ torch.randn(400, 400)
        return 1

    assert prompt.remember("a", slow) == 1
    assert prompt.borrowed_seconds == 0
    assert prompt.remember("a", slow) == 1
    assert prompt.borrowed_seconds == prompt.memo["a"][1] > 0
    prompt.borrowed_seconds = 0.0
    assert prompt.offline("b", slow) == 1
    spent = prompt.borrowed_seconds
    assert spent < 0
    assert prompt.offline("b", slow) == 1
    assert prompt.borrowed_seconds == spent


def test_what_is_known_of_a_model_goes_with_it() -> None:
    from hkvprof.evaluate.baselines import base

    prompt = random_prompt(0, 20, 0.5)
    prompt.offline("c", lambda: 1)
    before = len(base._OFFLINE)
    del prompt
    gc.collect()
    assert len(base._OFFLINE) == before - 1


@pytest.mark.parametrize("name", [n for n in ALL if baselines()[n].needs_profile])
def test_methods_that_need_a_profile_say_so(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} needs a profile"):
        decide(find(name), random_prompt(0, 30, 0.3))


def test_peers_cite_a_paper_and_ablations_do_not() -> None:
    for method in baselines().values():
        assert method.title
        assert method.paper.startswith("arXiv ") == (method.public and method.name != "random")


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match="expected one of streaming_llm"):
        find("h2o")
