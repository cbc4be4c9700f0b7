"""Passes that do not finish, and what a cache takes no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import CompressionError, HkvError, ModelError, UsageError
from hkvprof.models.calls import cache_of, with_cache
from tests.models_for_tests import apply, random_llama, token_ids

IDS, STEP = token_ids(1, 200), token_ids(1, 1, 5)
GREEDY: dict[str, Any] = {
    "max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0,
}  # fmt: skip


class Stop(BaseException):
    """As Ctrl-C: no Exception."""


def broken_layer(model: Any, cache: Any) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    hook = model.model.layers[1].register_forward_hook(stop)
    try:
        model(input_ids=STEP, **with_cache(model, cache))
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_a_cache_that_a_pass_left_half_filled_is_used_no_more(kind: str, budget: float) -> None:
    model = random_llama()
    profile = uniform_profile(model, kind, index="mean", chunk=8)
    with torch.no_grad(), apply(model, profile, budget=budget) as handle:
        cache = handle.new_cache()
        model(input_ids=IDS, **with_cache(model, cache))
        with pytest.raises(Stop):
            broken_layer(model, cache)
        with pytest.raises(CompressionError, match="did not finish"):
            model(input_ids=STEP, **with_cache(model, cache))
        cache.reset()
        fresh = handle.new_cache()
        again = [model(input_ids=IDS, **with_cache(model, c)).logits for c in (cache, fresh)]
        assert torch.equal(*again)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_another_number_of_rows_is_refused_and_harms_nothing(kind: str) -> None:
    model = random_llama()
    profile = uniform_profile(model, kind, index="mean", chunk=8)
    with torch.no_grad(), apply(model, profile, budget=0.3) as handle:
        cache, other = handle.new_cache(), handle.new_cache()
        for one in (cache, other):
            model(input_ids=IDS, **with_cache(model, one))
        with pytest.raises(UsageError, match="holds 1 batch rows and the pass brings 2"):
            model(input_ids=STEP.repeat(2, 1), **with_cache(model, cache))
        steps = [model(input_ids=STEP, **with_cache(model, c)).logits for c in (cache, other)]
        assert torch.equal(*steps)


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_another_dtype_is_refused(budget: float) -> None:
    model = random_llama()
    with torch.no_grad(), apply(model, uniform_profile(model), budget=budget) as handle:
        cache = handle.new_cache()
        model(input_ids=IDS, **with_cache(model, cache))
        model.to(torch.bfloat16)
        with pytest.raises(CompressionError, match=r"holds torch\.float32"):
            model(input_ids=STEP, **with_cache(model, cache))
        assert cache_of(model(input_ids=IDS)).get_seq_length() == 200


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_draft_model_under_a_profile_of_its_own(kind: str, budget: float) -> None:
    model, small = random_llama(), random_llama(layers=1, seed=3)
    profile = uniform_profile(small, kind, index="mean", chunk=8)
    expected = model.generate(input_ids=IDS, **GREEDY)
    with apply(small, profile, budget=budget):
        found = model.generate(input_ids=IDS, assistant_model=small, **GREEDY)
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("more", [{}, {"use_cache": False}])
def test_training_under_gradient_checkpointing(more: dict[str, Any]) -> None:
    bare, model = random_llama(), random_llama()
    for one in (bare, model):
        one.train()
        one.gradient_checkpointing_enable()
    bare(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    with apply(model, uniform_profile(model), budget=0.3) as handle:
        model(input_ids=IDS, labels=IDS, **more).loss.backward()
        assert "part of training" in str(handle.receipt())
        with pytest.raises(ModelError, match="training mode"):
            model.generate(input_ids=IDS, **GREEDY)
    for mine, theirs in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


WRONG: tuple[tuple[str, Any], ...] = (
    *(("min_tokens", value) for value in ("a", None, 1.5, float("nan"), True, 0)),
    *(("compress_every", value) for value in ("a", None, 2.5, True, -1)),
    *(("smoothing", value) for value in ("a", True, 1.0)),
    *(("monitor", value) for value in ("a", None, 2)),
    ("prefetch", "a"), ("strict", None), ("decode_compression", False),
    ("buget", 0.1),
)  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_options_of_the_wrong_kind_are_refused_by_name(name: str, value: Any) -> None:
    model = random_llama(layers=1)
    with pytest.raises(HkvError, match=name):
        apply(model, uniform_profile(model), **{"budget": 0.3, name: value})
    assert "forward" not in vars(model)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "a", True])
def test_prompt_tokens_must_be_a_count(tokens: Any) -> None:
    model = random_llama(layers=1)
    new_cache: Callable[..., Any]
    with apply(model, uniform_profile(model), budget=0.3) as handle:
        new_cache = handle.new_cache
        with pytest.raises(UsageError, match="prompt_tokens must"):
            new_cache(tokens)
