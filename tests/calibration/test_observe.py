"""Observation shows what the model computes and changes nothing about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import hkvprof
from hkvprof.calibration.continuation import Continuation, build_continuation
from hkvprof.calibration.observe import ObservedCache, Observer
from hkvprof.errors import ModelError
from hkvprof.models.adapter import view_model
from hkvprof.models.attention import AttentionCall, hooked_attention
from hkvprof.models.calls import with_cache
from hkvprof.testbed.generator import make_sample

WINDOW = 16


@pytest.fixture(scope="module")
def model() -> Any:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")[0]


@pytest.fixture(scope="module")
def processor() -> Any:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")[1]


@pytest.fixture(scope="module")
def sample() -> Any:
    return make_sample("list", 2, images=3, split="calibration", followups=1)


@pytest.fixture(scope="module")
def inputs(processor: Any, sample: Any) -> dict[str, Tensor]:
    return processor.encode([sample.messages]).inputs


@pytest.fixture(scope="module")
def continuation(processor: Any, sample: Any) -> Continuation:
    return build_continuation(processor, sample, sample.reply, 192)


def two_passes(model: Any, inputs: dict[str, Tensor], ids: Tensor, cache: Any) -> list[Tensor]:
    prompt = model(**inputs, **with_cache(model, cache)).logits
    return [prompt, model(input_ids=ids[None], **with_cache(model, cache)).logits]


@pytest.mark.parametrize("phases", [("prefill", "trace"), ("off", "off")])
def test_observed_logits_are_bit_identical(
    model: Any, inputs: dict[str, Tensor], continuation: Continuation, phases: tuple[str, str]
) -> None:
    view = view_model(model)
    with torch.no_grad():
        plain = two_passes(model, inputs, continuation.ids, DynamicCache(config=view.text_config))
        observer = Observer(WINDOW)
        cache = ObservedCache(view, observer)
        with hooked_attention(model):
            with observer.phase(phases[0]):
                prompt = model(**inputs, **with_cache(model, cache)).logits
            with observer.phase(phases[1]):
                rest = model(input_ids=continuation.ids[None], **with_cache(model, cache)).logits
    assert torch.equal(prompt, plain[0])
    assert torch.equal(rest, plain[1])
    assert bool(observer.traces) == (phases[1] == "trace")


def test_every_layer_is_seen_once_per_pass_with_what_it_computed(
    model: Any, inputs: dict[str, Tensor], continuation: Continuation
) -> None:
    view = view_model(model)
    grid, prompt = view.grid, inputs["input_ids"].shape[1]
    seen: list[int] = []
    queries: dict[int, Tensor] = {}

    def watch(layer: int, call: AttentionCall, output: Tensor) -> None:
        seen.append(layer)
        queries[layer] = call.query.clone()
        assert call.key.shape == (1, grid.kv_heads, prompt, grid.head_dim)
        assert output.shape == (1, prompt, grid.query_heads, grid.head_dim)

    spoken: dict[int, Tensor] = {}
    hooks = [
        module.o_proj.register_forward_pre_hook(
            lambda _, arguments, layer=layer: spoken.__setitem__(layer, arguments[0])
        )
        for layer, module in enumerate(view.attention)
    ]
    observer = Observer(WINDOW, on_prefill=watch)
    cache = ObservedCache(view, observer)
    try:
        with torch.no_grad(), hooked_attention(model):
            with observer.phase("prefill"):
                model(**inputs, **with_cache(model, cache))
            with observer.phase("trace"):
                model(input_ids=continuation.ids[None], **with_cache(model, cache))
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == list(range(grid.layers))
    for layer in range(grid.layers):
        assert torch.equal(observer.window_query[layer], queries[layer][0, :, -WINDOW:])
        trace = observer.traces[layer]
        assert torch.equal(trace.output.flatten(2), spoken[layer])
        # The trace's queries, attending by hand, give the trace's outputs.
        stored = cache.covered[layer]
        keys = stored.keys[0].repeat_interleave(grid.group, dim=0)
        values = stored.values[0].repeat_interleave(grid.group, dim=0)
        logits = trace.query @ keys.transpose(1, 2) * trace.scaling
        rows = len(continuation.ids)
        future = torch.ones(rows, prompt + rows, dtype=torch.bool).triu(prompt + 1)
        by_hand = logits.masked_fill(future, -torch.inf).softmax(-1) @ values
        assert torch.allclose(by_hand.transpose(0, 1), trace.output[0], atol=1e-4)


def test_gradients_reach_every_layer_and_are_right(
    model: Any, inputs: dict[str, Tensor], continuation: Continuation
) -> None:
    """A small change of one layer's output changes the objective as its gradient says."""
    view = view_model(model)
    ids = continuation.ids[None]

    def objective(logits: Tensor) -> Tensor:
        rows = logits[0, continuation.rows].log_softmax(-1)
        return rows.gather(-1, continuation.targets[:, None]).sum()

    observer = Observer(WINDOW)
    cache = ObservedCache(view, observer)
    with hooked_attention(model):
        with torch.no_grad(), observer.phase("prefill"):
            model(**inputs, **with_cache(model, cache))
        with torch.enable_grad(), observer.phase("trace"):
            value = objective(model(input_ids=ids, **with_cache(model, cache)).logits)
            value.backward()
        cache.crop(-ids.shape[1])
        row = int(continuation.rows[0])
        direction = torch.randn(
            view.grid.query_heads * view.grid.head_dim, generator=torch.Generator().manual_seed(0)
        )
        for layer in range(view.grid.layers):
            gradient = observer.traces[layer].output.grad
            assert gradient is not None
            slopes = []
            for sign in (-1, 1):
                step = 3e-3 * sign

                def nudge(module: Any, arguments: Any, step: float = step) -> Any:
                    moved = arguments[0].clone()
                    moved[0, row] += step * direction
                    return (moved,)

                hook = view.attention[layer].o_proj.register_forward_pre_hook(nudge)
                with torch.no_grad():
                    slopes.append(
                        float(objective(model(input_ids=ids, **with_cache(model, cache)).logits))
                    )
                hook.remove()
                cache.crop(-ids.shape[1])
            slope = (slopes[1] - slopes[0]) / 6e-3
            expected = float(gradient[0, row].flatten() @ direction)
            assert slope == pytest.approx(expected, rel=0.05, abs=2e-2), layer
    model.zero_grad(set_to_none=True)


def test_the_model_is_left_as_it_was(model: Any, inputs: dict[str, Tensor]) -> None:
    text = model.config.get_text_config(decoder=True)
    before = (text._attn_implementation, model.config._attn_implementation)
    names = set(vars(model))
    with hooked_attention(model):
        assert text._attn_implementation != before[0]
    assert (text._attn_implementation, model.config._attn_implementation) == before
    assert set(vars(model)) == names


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_attention_is_restored_after_an_exception(
    model: Any, inputs: dict[str, Tensor], error: type[BaseException]
) -> None:
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation

    def fail(layer: int, call: AttentionCall, output: Tensor) -> None:
        if layer == 3:
            raise error

    observer = Observer(WINDOW, on_prefill=fail)
    with pytest.raises(error), torch.no_grad(), hooked_attention(model), observer.phase("prefill"):
        model(**inputs, **with_cache(model, ObservedCache(view_model(model), observer)))
    assert text._attn_implementation == before
    assert observer._phase == "off"
    with torch.no_grad():  # and the model still runs
        assert bool(model(**inputs).logits.isfinite().all())


def test_eager_attention_is_refused_before_anything_changes(model: Any) -> None:
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(ModelError, match="sdpa"), hooked_attention(model):
            pass
        assert text._attn_implementation == "eager"
    finally:
        model.set_attn_implementation(before)
