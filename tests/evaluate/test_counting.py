"""Float32 counted as 16 bits: the tokens, and the shares, are those of a 16-bit model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.evaluate.compare import compare
from hkvprof.evaluate.contest import ComparisonPlan, Contest, MethodAtBudget, ProfiledModel
from hkvprof.evaluate.counting import Widened
from hkvprof.evaluate.metrics import EXACT_MATCH
from hkvprof.evaluate.prefill import capture
from hkvprof.evaluate.records import OURS, Answer, TaskSet
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.profile.costs import dynamic_layout, static_layout
from hkvprof.profile.record import Profile, load_profile
from hkvprof.runtime.plan import HeadPlan
from hkvprof.testbed.generator import make_sample

METHODS = ((OURS, "0.1"), (OURS, "0.3"), ("quest", "0.2"), ("snapkv", "0.1"), ("hybridkv", "0.2"),
           ("all_dynamic", "0.1"), ("snapkv_int4", "0.1"), ("rdkv", "0.1"), ("kivi_int4", "0.5"),
           (OURS, "100"), (OURS, "200KiB"))  # fmt: skip


def held(dtype: str, profile: Profile, itemsize: int | None) -> dict[Any, Any]:
    """Tokens of every head and counted bytes, by method and budget."""
    model, processor = hkvprof.load_model("tinyvl", dtype=dtype, device="cpu")
    sample = make_sample("list", 1, images=12, split="heldout")
    prefill = capture(model, processor.encode([sample.messages]))
    contest = Contest(ProfiledModel(model, processor, profile), 0, itemsize)
    found = {}
    for method, budget in METHODS:
        with contest.open(MethodAtBudget(method, budget), prefill) as caches:
            cache = caches()
            heads = [head for layer in cache.receipt().layers for head in layer.heads]
            tokens = [head.tokens_resident for head in heads]
            found[method, budget] = ([head.strategy for head in heads], tokens, caches.count(cache))
    return found


def test_float32_holds_and_counts_what_bfloat16_does() -> None:
    profile = load_profile("profiles/tinyvl.hkv.safetensors")
    wide, narrow = held("float32", profile, 2), held("bfloat16", profile, None)
    for key, (strategies, tokens, count) in narrow.items():
        if key[0] != "hybridkv":  # its types are of attention, which the dtype moves
            assert wide[key][0] == strategies, key
        if key[0] not in ("hybridkv", "rdkv"):
            assert wide[key][1] == tokens, key
            assert wide[key][2] == count, key
        assert wide[key][2].dense == count.dense
        assert wide[key][2].resident == pytest.approx(count.resident, rel=0.05), key


def test_plain_float32_is_counted_as_it_is() -> None:
    profile = load_profile("profiles/tinyvl.hkv.safetensors")
    as_it_is = held("float32", profile, None)
    for (method, budget), (_, tokens, count) in as_it_is.items():
        if method in ("snapkv", OURS) and not budget.endswith("KiB"):
            assert count.resident == count.storage
        assert sum(tokens) > 0


def test_later_passes_go_on_from_plans_that_were_widened() -> None:
    """Turns and replies join the budget as under `apply`, and the answers are close to bfloat16's
    share."""
    model, processor = hkvprof.load_model("tinyvl", dtype="float32", device="cpu")
    sample = make_sample("list", 3, images=4, rows=6, cols=6, split="heldout", followups=1)
    tasks = TaskSet("one", (sample,), EXACT_MATCH, 4)
    profile = uniform_profile(model, "dynamic", budget=0.3, chunk=4)
    plan = ComparisonPlan(("0.3",), ("snapkv",), steps=24, itemsize=2)
    answers: list[Answer] = compare(ProfiledModel(model, processor, profile), tasks, plan)
    assert {a.regime for a in answers} == {"inside", "after", "later"}
    for answer in answers:
        assert answer.dense_bytes == answer.prompt_tokens * 2 * 6 * 4 * 32 * 2
        if answer.method != "full":
            assert answer.resident_bytes <= 0.3 * answer.dense_bytes + 8 * 24
            assert answer.storage_bytes == pytest.approx(answer.resident_bytes, rel=0.01)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(30, 3000),
    ratio=st.floats(0.03, 0.9),
    dim=st.sampled_from((32, 64, 128)),
    bits=st.sampled_from((4, 8, 16)),
    strategy=st.sampled_from(
        (
            Strategy(HeadType.STATIC),
            Strategy(HeadType.DYNAMIC, index="mean", chunk=4),
            Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=8),
        )
    ),
)
def test_widened_plans_mean_the_same_tokens(
    tokens: int, ratio: float, dim: int, bits: int, strategy: Strategy
) -> None:
    """For every strategy and precision of residents, by the runtime's own layouts."""
    keep, strategy = KeepRule(), replace(strategy, resident_bits=bits)
    wide = Widened(keep, tokens, dim, 8, 2, 4).plan(HeadPlan(strategy, ratio))
    if strategy.head_type is HeadType.STATIC:
        one, other = (
            static_layout(strategy, r, tokens, keep, dim, size)
            for r, size in ((ratio, 2), (wide.ratio, 4))
        )
        assert one == other
        return
    layout = dynamic_layout(strategy, ratio, tokens, keep, dim, 2, 8)
    if layout is None:
        assert wide.strategy.head_type is HeadType.STATIC
    else:
        assert dynamic_layout(strategy, wide.ratio, tokens, keep, dim, 4, 8) == layout
