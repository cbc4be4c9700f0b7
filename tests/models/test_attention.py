"""The seam with transformers' attention: hooked, restored, refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hkvprof.errors import ModelError, UsageError
from hkvprof.models.attention import (
    AttentionCall,
    hook_attention,
    hooked_attention,
    mark,
    refuse_features,
)
from hkvprof.models.calls import with_cache
from hkvprof.models.load import load_model
from tests.models.conversations import picture, user
from tests.models.tiny import build_covered


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model("tinyvl", dtype="float32", device="cpu")


@pytest.fixture
def tinyvl(loaded: tuple[Any, Any]) -> Iterator[Any]:
    yield loaded[0]
    assert implementations(loaded[0]) == ("sdpa", "sdpa", "sdpa"), "a test left the model hooked"


@pytest.fixture
def inputs(loaded: tuple[Any, Any]) -> dict[str, Tensor]:
    model, processor = loaded
    encoded = processor.encode([[user(picture(112, 112), "how many disc")], [user("how many")]])
    return encoded.to(model.device, model.dtype)


def implementations(model: Any) -> tuple[str, str, str]:
    config = model.config
    parts = (config, config.text_config, config.vision_config)
    return tuple(part._attn_implementation for part in parts)  # type: ignore[return-value]


class WatchedLayer(DynamicLayer):
    """A stock layer that marks its keys and counts what comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        return mark(keys, self), values

    def attend(self, call: AttentionCall) -> tuple[Tensor, Any]:
        self.calls.append(call)
        return call.dense()


def watched_cache(model: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [WatchedLayer() for _ in cache.layers]
    return cache


def test_only_the_decoder_is_hooked(tinyvl: Any) -> None:
    with hooked_attention(tinyvl):
        assert implementations(tinyvl) == ("sdpa", "hkvprof_sdpa", "sdpa")
        assert tinyvl.model.language_model.config._attn_implementation == "hkvprof_sdpa"
        assert tinyvl.model.visual.config._attn_implementation == "sdpa"


def test_a_model_without_sub_configs_is_hooked() -> None:
    model = build_covered("llama")
    with hooked_attention(model):
        assert model.config._attn_implementation == "hkvprof_sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_the_config_is_restored_exactly(tinyvl: Any) -> None:
    before = copy.deepcopy(vars(tinyvl.config.text_config)), tinyvl.config.to_json_string()
    restore = hook_attention(tinyvl)
    restore()
    assert vars(tinyvl.config.text_config) == before[0]
    assert tinyvl.config.to_json_string() == before[1]
    restore()  # harmless
    assert vars(tinyvl.config.text_config) == before[0]


def test_an_exception_inside_restores(tinyvl: Any) -> None:
    with pytest.raises(ZeroDivisionError), hooked_attention(tinyvl):
        raise ZeroDivisionError
    assert implementations(tinyvl) == ("sdpa", "sdpa", "sdpa")


def test_hooking_twice_is_refused_and_the_first_stays(tinyvl: Any) -> None:
    with hooked_attention(tinyvl):
        with pytest.raises(UsageError, match="hooked already: detach"):
            hook_attention(tinyvl)
        assert implementations(tinyvl) == ("sdpa", "hkvprof_sdpa", "sdpa")


def test_two_models_can_be_hooked_at_once(tinyvl: Any) -> None:
    other = build_covered("llama")
    with hooked_attention(tinyvl):
        with hooked_attention(other):
            assert other.config._attn_implementation == "hkvprof_sdpa"
        assert implementations(tinyvl) == ("sdpa", "hkvprof_sdpa", "sdpa")


@pytest.mark.parametrize("name", ["eager", "flash_attention_2"])
def test_other_implementations_are_refused_with_the_way_out(name: str, tinyvl: Any) -> None:
    text_config = tinyvl.config.text_config
    text_config._attn_implementation_internal = name
    try:
        with pytest.raises(
            ModelError, match=f"'{name}' is not supported: load the model with attn"
        ):
            hook_attention(tinyvl)
        assert text_config._attn_implementation == name
    finally:
        text_config._attn_implementation_internal = "sdpa"


def test_a_model_whose_attention_cannot_be_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_covered("llama")
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(ModelError, match="does not go through transformers' AttentionInterface"):
        hook_attention(model)


def test_unmarked_keys_take_the_dense_path(tinyvl: Any, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected = tinyvl(**inputs).logits
        with hooked_attention(tinyvl):
            assert torch.equal(tinyvl(**inputs).logits, expected)
        assert torch.equal(tinyvl(**inputs).logits, expected)


def test_marked_keys_reach_their_layer(tinyvl: Any, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected = tinyvl(**inputs).logits
        cache = watched_cache(tinyvl)
        with hooked_attention(tinyvl):
            assert torch.equal(tinyvl(**inputs, **with_cache(tinyvl, cache)).logits, expected)
    rows, tokens = inputs["input_ids"].shape
    for number, layer in enumerate(cache.layers):
        (call,) = layer.calls
        assert call.module.layer_idx == number
        assert call.query.shape == (rows, 8, tokens, 32)
        assert call.key.shape == call.value.shape == (rows, 4, tokens, 32)
        assert call.scaling == pytest.approx(32**-0.5)
        assert call.mask is not None, "left padding reaches the layer as a mask"
        assert call.mask.shape[-2:] == (tokens, tokens)


def test_marked_keys_do_nothing_without_the_hook(tinyvl: Any, inputs: dict[str, Tensor]) -> None:
    cache = watched_cache(tinyvl)
    with torch.no_grad():
        tinyvl(**inputs, **with_cache(tinyvl, cache))
    assert not any(layer.calls for layer in cache.layers)


def test_a_mark_does_not_keep_its_layer_alive(tinyvl: Any) -> None:
    layer = WatchedLayer()
    keys, values = torch.zeros(2, 1, 4, 3, 32).unbind()
    marked = mark(keys, layer)
    del layer
    query = torch.randn(1, 8, 3, 32)
    module = tinyvl.model.language_model.layers[0].self_attn
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with hooked_attention(tinyvl):
        function = ALL_ATTENTION_FUNCTIONS["hkvprof_sdpa"]
        output, _ = function(module, query, marked, values, None)
    assert output.shape == (1, 3, 8, 32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"s_aux": torch.zeros(8)}, "learned attention sinks"),
        ({"softcap": 30.0}, "soft-capping"),
        ({"position_bias": torch.zeros(1)}, "a position bias"),
        ({"cache": object()}, "a paged cache"),
        ({"sliding_window": 128}, "a sliding window"),
        ({"output_attentions": True}, "output_attentions=True is not supported"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(
    kwargs: dict[str, Any], message: str, tinyvl: Any
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layer = WatchedLayer()
    query, keys = torch.randn(1, 8, 3, 32), torch.randn(1, 4, 3, 32)
    module = tinyvl.model.language_model.layers[0].self_attn
    with hooked_attention(tinyvl):
        function = ALL_ATTENTION_FUNCTIONS["hkvprof_sdpa"]
        with pytest.raises(ModelError, match=message):
            function(module, query, mark(keys, layer), keys, None, **kwargs)
    assert not layer.calls


def test_arguments_that_say_nothing_are_fine() -> None:
    refuse_features({"s_aux": None, "softcap": None, "output_attentions": False, "dropout": 0.0})
