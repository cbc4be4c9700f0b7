"""The benchmark on a small random model: honest rows, equal work, and one clear error each."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.cache_utils import StaticCache

from hkvprof.bench import machine
from hkvprof.bench.contestant import BenchModel, PromptContestant
from hkvprof.bench.methods import Kind, Method, variants
from hkvprof.bench.prompts import PromptSetup, random_prompt
from hkvprof.bench.records import Context
from hkvprof.bench.run import bench_prompts, describe
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import BudgetError, CompressionError, HkvError, UsageError
from hkvprof.models.calls import with_cache
from hkvprof.profile.record import Profile
from hkvprof.runtime import kernels
from tests.models_for_tests import random_llama

SETUP = PromptSetup(contexts=(512, 256), budgets=("0.25", "0.5"), new_tokens=36, rounds=4, batch=2)


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama(layers=2)


@pytest.fixture(scope="module")
def measured(llama: Any) -> Profile:
    """As if calibrated: planned anew for every budget, with both types in the menu."""
    return replace(uniform_profile(llama), recipe="measured")


def measure(model: Any, profile: Profile, setup: PromptSetup, *kinds: str) -> tuple[Context, ...]:
    def prompt(tokens: int) -> Any:
        return random_prompt(model, tokens, setup.batch, setup.new_tokens)

    return bench_prompts(model, variants(profile, kinds), prompt, setup)


@pytest.fixture(scope="module")
def contexts(llama: Any, measured: Profile) -> tuple[Context, ...]:
    return measure(llama, measured, SETUP)


def test_every_method_has_a_row_at_every_context(contexts: tuple[Context, ...]) -> None:
    assert [context.tokens for context in contexts] == [256, 512]
    for context in contexts:
        assert context.groups == 1
        assert [row.method for row in context.rows] == [
            "dense", "dense, preallocated", "static only, 0.25", "dynamic only, 0.25",
            "profile, 0.25", "static only, 0.5", "dynamic only, 0.5", "profile, 0.5",
        ]  # fmt: skip
        assert not any(row.reason for row in context.rows)
        assert {row.steps for row in context.rows} == {32}


def test_bytes_are_those_of_the_caches(contexts: tuple[Context, ...]) -> None:
    for context in contexts:
        token = 2 * 2 * 2 * 2 * 16 * 4  # rows, layers, heads, K and V, width, float32
        dense, preallocated = context.rows[:2]
        assert dense.resident_bytes == dense.storage_bytes == token * context.tokens
        assert preallocated.resident_bytes == token * (context.tokens + 36)
        assert preallocated.storage_bytes == preallocated.resident_bytes
        for row in context.rows[2:]:
            assert row.resident_bytes == row.storage_bytes
            assert row.dense_share is not None
            assert row.dense_share <= float(row.budget) * 1.05
            assert bool(row.host_bytes) == (row.kind == "dynamic")


def test_times_are_there_and_their_ratios_fit(contexts: tuple[Context, ...]) -> None:
    for context in contexts:
        dense, preallocated = context.rows[:2]
        for row in context.rows:
            assert row.step_ms is not None
            assert 0 < row.step_ms <= (row.step_ms_p90 or 0)
            assert row.speedup_over_dense == (dense.step_ms or 0) / row.step_ms
            assert row.speedup_over_preallocated == (preallocated.step_ms or 0) / row.step_ms
            assert (row.compression_seconds is None) == (not row.budget)
            assert (row.hit_rate is None) == (row.kind != "dynamic")


def test_the_model_is_left_as_it_was(llama: Any, contexts: tuple[Context, ...]) -> None:
    assert contexts
    assert llama.config._attn_implementation == "sdpa"
    assert "generate" not in vars(llama)


def test_without_memory_methods_run_one_after_the_other(
    llama: Any, measured: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "host_free", lambda share: 1)
    (context,) = measure(llama, measured, replace(SETUP, contexts=(256,), budgets=("0.5",)))
    assert context.groups == len(context.rows)
    assert all(row.step_ms for row in context.rows)


def test_a_model_that_cannot_preallocate_says_so(
    llama: Any, measured: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no static cache here\nat all")

    monkeypatch.setattr(StaticCache, "__init__", refuse)
    found = measure(llama, measured, replace(SETUP, budgets=("0.5",)), "profile")
    for context in found:
        assert context.rows[1].reason == "transformers cannot: no static cache here"
        assert context.row("dense, preallocated") is None
        assert context.rows[0].speedup_over_preallocated is None


def test_methods_continue_with_the_same_tokens_as_generation_would(llama: Any) -> None:
    """Dense and preallocated caches lead to the logits of one pass over everything."""
    prompt = random_prompt(llama, 40, 2, 8)
    whole = torch.cat([prompt.inputs["input_ids"], prompt.forced], dim=1)
    with torch.no_grad():
        expected = llama(input_ids=whole).logits[:, -1]
    for kind in (Kind.DENSE, Kind.PREALLOCATED):
        contestant = PromptContestant(BenchModel.of(llama), Method(kind), prompt)
        contestant.prefill()
        contestant.decode(5)
        contestant.decode(2)
        with torch.no_grad():
            last = llama(input_ids=prompt.forced[:, 7:], **with_cache(llama, contestant.cache))
        assert torch.allclose(last.logits[:, -1], expected, atol=1e-4)
        assert [len(block) for block in contestant.blocks] == [5, 2]
        assert len(contestant.step_ms) == 5


def test_a_budget_too_small_for_one_type_is_a_row_and_for_the_profile_an_error(
    llama: Any, measured: Profile
) -> None:
    setup = replace(SETUP, contexts=(256,), budgets=("0.06",))
    (context,) = measure(llama, measured, setup)
    reasons = {row.kind: row.reason for row in context.rows}
    assert "too small" in reasons["dynamic"]
    assert reasons["static"] == reasons["profile"] == ""
    small = replace(setup, budgets=("0.02",))
    with pytest.raises(BudgetError, match=r"at a context of 256 tokens: budget 0.02 is too small"):
        measure(llama, measured, small)
    (lenient,) = measure(llama, measured, replace(small, strict=False), "profile")
    assert "too small" in lenient.rows[-1].reason


@pytest.mark.parametrize(
    ("change", "words"),
    [({"contexts": (256, 5000)}, "5000 tokens is over the model's limit of 4096"),
     ({"budgets": ("1.0",)}, "compresses nothing"),
     ({"budgets": ("300",), "contexts": (256,)}, "holds a prompt of 256 tokens whole")],
)  # fmt: skip
def test_what_cannot_be_measured(
    llama: Any, measured: Profile, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        measure(llama, measured, replace(SETUP, **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"contexts": ()}, "no context"), ({"contexts": (0,)}, "no context"), ({"batch": 0}, "batch"),
     ({"new_tokens": 16}, "leave 12 timed steps"), ({"rounds": 36}, "leave 0 timed")],
)  # fmt: skip
def test_setups_that_make_no_sense(change: dict[str, Any], words: str) -> None:
    with pytest.raises(HkvError, match=words):
        replace(SETUP, **change)


def test_a_row_that_compresses_nothing_fails(
    llama: Any, measured: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that leaves every prompt dense."""
    import hkvprof.bench.contestant as contestant

    apply = contestant.apply

    def idle(model: Any, profile: Profile, **options: Any) -> Any:
        return apply(model, profile, **{**options, "min_tokens": 10_000})

    monkeypatch.setattr(contestant, "apply", idle)
    with pytest.raises(CompressionError, match=r"nothing was compressed .*min_tokens"):
        measure(llama, measured, replace(SETUP, contexts=(256,)), "profile")


def test_the_regime_names_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "status", lambda: "triton, checked")
    regime = describe(random_llama(), "llama", "p", replace(SETUP, batch=3, new_tokens=64))
    assert (regime.layers, regime.batch, regime.dtype) == (3, 3, "float32")
    assert regime.threads == torch.get_num_threads()
    assert set(regime.versions) == {"hkvprof", "torch", "transformers"}
    for word in ("llama", "batch 3", "float32 on cpu", "kernels: triton, checked", "64 forced"):
        assert word in str(regime)
