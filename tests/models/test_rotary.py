"""Which models have biases that turn with positions, and how they turn, tried out on the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hkvprof.errors import HkvWarning
from hkvprof.models.adapter import view_model
from hkvprof.models.calls import with_cache
from hkvprof.models.rotary import rotary_module, rotating_keys, turning, watching_positions
from hkvprof.selection.rotary import Positions
from tests.models.tiny import COVERED, build_covered

BIASED = {"qwen2", "qwen2-vl", "qwen2.5-vl", "llava-onevision", "internvl", "glm4v-moe", "seed-oss"}
OTHERWISE = {"gemma4", "gemma4-text", "glm4", "glm4v", "glm46v", "ministral3", "exaone4", "cohere2"}
"""Neighbouring channels turn together, some layers turn nothing, or attention cannot be called by
itself: scores by calibrated queries are left out."""
SCALED: list[dict[str, Any]] = [
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
]


def built(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model; what biases it has are large."""
    model = build_covered(name, **changes).eval().to(dtype)
    with torch.no_grad():
        for module in view_model(model).attention:
            bias = getattr(getattr(module, "k_proj", None), "bias", None)
            if bias is not None:
                bias.copy_(torch.linspace(-9, 12, bias.numel()))
    return model


@torch.no_grad()
def keys_of_nothing(model: Any, ids: Tensor) -> Tensor:
    """The first layer's keys where its projection gives nothing but the bias."""
    from transformers.cache_utils import DynamicCache

    view = view_model(model)
    view.attention[0].k_proj.weight.zero_()  # type: ignore[union-attr]
    cache = DynamicCache(config=view.text_config)
    model(input_ids=ids, **with_cache(model, cache))
    keys = cache.layers[0].keys
    assert keys is not None
    return keys[0]


@pytest.mark.parametrize("name", COVERED)
def test_of_every_model_of_the_table(name: str) -> None:
    model = built(name)
    if name in ("glm4", "glm4v", "glm46v"):  # neighbouring channels turn together
        with pytest.warns(HkvWarning, match="takes the bias of this model's keys for a constant"):
            assert rotating_keys(model, view_model(model)) is None
        return
    found = rotating_keys(model, view_model(model))
    assert (found is not None) == (name in BIASED)
    if found is not None:
        assert found.bias.shape == (2, 2, 16)
        sides = name in ("qwen2-vl", "qwen2.5-vl", "glm4v-moe")
        wanted = [0, 0, 1, 1, 1, 2, 2, 2] if sides else [0] * 8
        assert found.axis.tolist() == wanted
        assert found.frequency[0] == 1


@pytest.mark.parametrize("scaling", [None, *SCALED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotated_bias_is_what_the_model_makes_of_it(
    scaling: dict[str, Any] | None, dtype: torch.dtype
) -> None:
    model = built("qwen2", dtype, **({"rope_parameters": scaling} if scaling else {}))
    found = rotating_keys(model, view_model(model))
    assert found is not None
    ids = torch.randint(3, 128, (1, 300), generator=torch.Generator().manual_seed(0))
    made = keys_of_nothing(model, ids).float()
    atol = 2e-3 if dtype == torch.float32 else 0.2
    for head, bias in enumerate(found.heads(0, torch.device("cpu"))):
        left = bias.removed(made[head], Positions(0, 300))
        torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_prompt_are_refused_by_name(kind: str) -> None:
    settings: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        settings |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        settings["original_max_position_embeddings"] = 256
    model = built("qwen2", rope_parameters=settings)
    with pytest.warns(HkvWarning, match=rf"{kind}\) have no frequencies that always hold"):
        assert rotating_keys(model, view_model(model)) is None


@torch.no_grad()
@pytest.mark.parametrize("name", COVERED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_queries_turn_is_known_of_every_model_of_the_table(
    name: str, dtype: torch.dtype
) -> None:
    """Two tokens that are alike have the same key, but for the rotation by their distance."""
    from transformers.cache_utils import DynamicCache

    model = build_covered(name).eval().to(dtype)
    view = view_model(model)
    if name in OTHERWISE:
        with pytest.warns(HkvWarning, match="are left out of the profile"):
            assert turning(model, view) is None
        return
    found = turning(model, view)
    assert found is not None
    assert found.frequency[0] <= 1
    told: list[Tensor] = []
    cache = DynamicCache(config=view.text_config)
    with watching_positions(model, view, lambda positions, _: told.append(positions[:, 0])):
        model(input_ids=torch.full((1, 40), 9), **with_cache(model, cache))
    keys = cache.layers[view.layer_ids[0]].keys[0]
    if view.layer_ids[0] == 0:  # later layers see what came before
        still = found.undone(keys, Positions.of(told[-1]))
        atol = 1e-4 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(still, still[:, :1].expand_as(still), rtol=0.02, atol=atol)


@pytest.mark.parametrize("scaling", SCALED, ids=str)
def test_scaled_frequencies_are_those_of_the_model(scaling: dict[str, Any]) -> None:
    model = built("qwen2", rope_parameters=scaling)
    found, biased = turning(model, view_model(model)), rotating_keys(model, view_model(model))
    assert found is not None
    assert biased is not None
    np.testing.assert_array_equal(found.frequency, biased.frequency)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scores_by_queries_are_left_out_where_frequencies_change(kind: str) -> None:
    settings: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        settings |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        settings["original_max_position_embeddings"] = 256
    model = built("llama", rope_parameters=settings)
    with pytest.warns(HkvWarning, match=rf"scored by the prompt's last rows alone.*{kind}\)"):
        assert turning(model, view_model(model)) is None


def test_a_layer_that_does_not_turn_is_noticed() -> None:
    """As SmolLM3 has some."""
    model = built("llama")
    attention = view_model(model).attention[1]
    own = attention.forward

    def still(hidden_states: Tensor, position_embeddings: Any, **others: Any) -> Any:
        cosine, sine = position_embeddings
        pair = torch.ones_like(cosine), torch.zeros_like(sine)
        return own(hidden_states, position_embeddings=pair, **others)

    attention.forward = still  # type: ignore[method-assign]
    with pytest.warns(HkvWarning, match="keys miss the expected rotation by"):
        assert turning(model, view_model(model)) is None


def test_a_model_without_rotary_embeddings_is_scored_by_the_window() -> None:
    model = built("llama")
    model.model.hidden, model.model.rotary_emb = model.model.rotary_emb, None
    with pytest.warns(HkvWarning, match="left out of the profile"):
        assert turning(model, view_model(model)) is None


def test_another_rotation_than_expected_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours turned against each other, as in GLM, in place of halves."""
    from transformers.models.qwen2 import modeling_qwen2

    def turn_neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> Any:
        cos, sin = (part[..., :8].repeat_interleave(2, -1)[:, None] for part in (cos, sin))

        def turn(x: Tensor) -> Tensor:
            crossed = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
            return x * cos + crossed * sin

        return turn(q), turn(k)

    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", turn_neighbours)
    model = built("qwen2")
    with pytest.warns(HkvWarning, match="miss the rotated bias"):
        assert rotating_keys(model, view_model(model)) is None
    with pytest.warns(HkvWarning, match="miss the expected rotation"):
        assert turning(model, view_model(model)) is None


def test_positions_are_seen_before_the_layers_and_no_longer_than_asked() -> None:
    model = built("qwen2.5-vl")
    view, seen = view_model(model), []
    assert rotary_module(model, view) is not None
    ids = torch.randint(10, 128, (2, 5))
    with watching_positions(model, view, lambda told, rows: seen.append((told, rows))):
        model(input_ids=ids)
    model(input_ids=ids)
    ((told, rows),) = seen
    assert rows == 2
    assert told.shape[0] == 3
    assert np.array_equal(told[:, 0].numpy(), np.tile(np.arange(5), (3, 1)))
