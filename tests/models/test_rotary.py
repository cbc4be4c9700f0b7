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
from hkvprof.models.rotary import rotary_module, rotating_keys, watching_positions
from hkvprof.selection.rotary import Positions
from tests.models.tiny import COVERED, build_covered

BIASED = {"qwen2", "qwen2-vl", "qwen2.5-vl", "llava-onevision", "internvl"}
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
    found = rotating_keys(model, view_model(model))
    assert (found is not None) == (name in BIASED)
    if found is not None:
        assert found.bias.shape == (2, 2, 16)
        wanted = [0, 0, 1, 1, 1, 2, 2, 2] if name.startswith("qwen2") and "vl" in name else [0] * 8
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
