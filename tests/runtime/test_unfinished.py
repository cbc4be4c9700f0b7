"""Passes that do not finish, and what a cache takes no more."""

from __future__ import annotations

import copy
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


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("given", [None, 301])
def test_a_step_that_shows_dropped_padding_is_refused(kind: str, given: int | None) -> None:
    """With no mask, or one that hides nothing, transformers hands none to a single token."""
    model = random_llama()
    ids, mask = token_ids(2, 300), torch.ones(2, 300, dtype=torch.long)
    mask[0, :60] = 0
    step, more = token_ids(2, 1, 5), torch.ones(2, 1, dtype=torch.long)
    profile = uniform_profile(model, kind, index="mean", chunk=8)
    shown = {} if given is None else {"attention_mask": torch.ones(2, given, dtype=torch.long)}
    with torch.no_grad(), apply(model, profile, budget=0.5) as handle:
        cache = handle.new_cache()
        model(input_ids=ids, attention_mask=mask, **with_cache(model, cache))
        with pytest.raises(ModelError, match=r"padding of rows \[0\]"):
            model(input_ids=step, **shown, **with_cache(model, cache))
    with torch.no_grad(), apply(model, profile, budget=0.5) as handle:
        cache = handle.new_cache()
        model(input_ids=ids, attention_mask=mask, **with_cache(model, cache))
        whole = torch.cat([mask, more], 1)
        model(input_ids=step, attention_mask=whole, **with_cache(model, cache))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_autocast_with_keys_and_values_of_two_dtypes_is_refused(kind: str) -> None:
    model = random_llama()
    profile = uniform_profile(model, kind, index="mean", chunk=8)
    with torch.autocast("cpu", torch.bfloat16):
        dense = model.generate(IDS, **GREEDY)
        with apply(model, profile, budget=1.0):
            assert torch.equal(model.generate(IDS, **GREEDY), dense)
        with (
            apply(model, profile, budget=0.3),
            pytest.raises(CompressionError, match=r"torch\.autocast"),
        ):
            model.generate(IDS, **GREEDY)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_cache_of_inference_mode_goes_on_within_it_or_as_a_copy(kind: str) -> None:
    model = random_llama()
    profile = uniform_profile(model, kind, index="mean", chunk=8)
    with apply(model, profile, budget=0.3) as handle:
        cache = handle.new_cache()
        with torch.inference_mode():
            model(input_ids=IDS, **with_cache(model, cache))
        with (
            torch.no_grad(),
            pytest.raises(CompressionError, match=r"torch\.inference_mode"),
        ):
            model(input_ids=STEP, **with_cache(model, cache))
        with torch.no_grad():
            branch = copy.deepcopy(cache)
            copied = model(input_ids=STEP, **with_cache(model, branch)).logits
        with torch.inference_mode():
            logits = model(input_ids=STEP, **with_cache(model, cache)).logits
        assert torch.equal(copied, logits)


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_layers_that_were_reordered_are_refused(budget: float) -> None:
    model = random_llama()
    layers = model.model.layers
    with apply(model, uniform_profile(model, "static"), budget=budget) as handle:
        model.model.layers = torch.nn.ModuleList([layers[1], layers[0], *layers[2:]])
        with pytest.raises(CompressionError, match="replaced or reordered"):
            model.generate(IDS, **GREEDY)
    assert handle.model is model
