"""Rotary embeddings taken back and carried on, against explicit rotations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hkvprof
from hkvprof.evaluate.prefill import Prefill, capture
from hkvprof.models.decoder_input import Rotation
from hkvprof.models.processing import Encoded
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import random_llama, token_ids

torch.set_num_threads(1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves against each other."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@pytest.fixture(scope="module")
def tinyvl() -> tuple[Any, Prefill]:
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    sample = make_sample("list", 1, images=4, split="calibration")
    return model, capture(model, processor.encode([sample.messages]))


def captured_llama(**options: Any) -> tuple[Any, Prefill]:
    model = random_llama(**options)
    ids = token_ids(1, 40)
    return model, capture(model, Encoded({"input_ids": ids}, torch.zeros_like(ids)))


def projected_queries(model: Any, prefill: Prefill) -> Tensor:
    """Queries of the first layer before any rotation, from the embeddings that it got."""
    block = next(m for m in model.modules() if hasattr(m, "self_attn"))
    with torch.no_grad():
        hidden = block.input_layernorm(prefill.decoder_input.embeddings)
        query = block.self_attn.q_proj(hidden)[0]
    return query.view(prefill.tokens, prefill.view.grid.query_heads, -1).transpose(0, 1)


@pytest.mark.parametrize("which", ["tinyvl", "llama", "yarn"])
def test_undone_queries_are_those_before_the_rotation(
    tinyvl: tuple[Any, Prefill], which: str
) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
            "original_max_position_embeddings": 1024}  # fmt: skip
    options = {"rope_parameters": yarn} if which == "yarn" else {}
    model, prefill = tinyvl if which == "tinyvl" else captured_llama(**options)
    rotation = prefill.decoder_input.rotation
    assert rotation is not None
    query = prefill.calls[0].query[0]
    undone = rotation.undo(query)
    assert torch.allclose(undone, projected_queries(model, prefill), atol=1e-4)
    assert torch.allclose(turned(undone, rotation.cos, rotation.sin), query, atol=1e-4)


def test_ahead_is_the_mean_of_explicit_rotations(tinyvl: tuple[Any, Prefill]) -> None:
    model, prefill = tinyvl
    whole = prefill.decoder_input.rotation
    assert whole is not None
    after_image = int((~prefill.text).nonzero().max()) + 2
    for count in (prefill.tokens, after_image):
        rotation = prefill.first(count).decoder_input.rotation
        assert rotation is not None
        delta = prefill.rope_deltas
        assert delta is not None
        start = prefill.tokens + int(delta) - (prefill.tokens - count)
        positions = torch.arange(start, start + 7)[None, None].expand(3, 1, -1)
        cos, sin = model.model.language_model.rotary_emb(torch.zeros(1), positions)
        cos, sin = (part.reshape(-1, 7, part.shape[-1])[0] for part in (cos, sin))
        x = torch.randn(cos.shape[-1])
        mean = turned(x.expand(7, -1), cos, sin).mean(dim=0)
        assert torch.allclose(rotation.ahead(7) @ x, mean, atol=1e-3)


def test_ahead_scales_as_the_model_does() -> None:
    angle = torch.arange(9)[:, None] * torch.tensor([0.5, 0.1, 0.5, 0.1])
    plain = Rotation(angle.cos(), angle.sin())
    scaled = Rotation(1.3 * angle.cos(), 1.3 * angle.sin())
    assert torch.allclose(scaled.ahead(5), 1.3 * plain.ahead(5), atol=1e-6)


def test_partial_rotation_leaves_the_rest_alone() -> None:
    angle = torch.arange(5)[:, None] * torch.tensor([0.5, 0.5])
    x = torch.randn(2, 5, 6)
    undone = Rotation(angle.cos(), angle.sin()).undo(x)
    assert torch.equal(undone[..., 2:], x[..., 2:])
    assert torch.allclose(turned(undone[..., :2], angle.cos(), angle.sin()), x[..., :2], atol=1e-6)
