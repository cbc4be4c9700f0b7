"""Prompts with known queries, keys and values, so that answers can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hkvprof.evaluate.baselines import PromptView
from hkvprof.evaluate.baselines.base import Kept, Selection
from hkvprof.evaluate.prefill import Prefill
from hkvprof.heads import HeadGrid
from hkvprof.models.attention import AttentionCall
from hkvprof.models.decoder_input import DecoderInput, Rotation


def nothing() -> tuple[Any, Any]:
    """The dense attention of a call that nobody runs."""
    return None, None


def prompt_of(
    query: Float[Tensor, "layers query_heads tokens dim"],
    key: Float[Tensor, "layers kv_heads tokens dim"],
    value: Float[Tensor, "layers kv_heads tokens dim"],
    share: float,
    text: Bool[Tensor, " tokens"] | None = None,
    scaling: float = 1.0,
    rotation: Rotation | None = None,
) -> PromptView:
    """A prompt that no model has read."""
    layers, query_heads, tokens, dim = query.shape
    grid = HeadGrid(layers, query_heads, key.shape[1], dim)
    calls = tuple(
        AttentionCall(torch.nn.Identity(), q[None], k[None], v[None], None, scaling, nothing)
        for q, k, v in zip(query, key, value, strict=True)
    )
    view: Any = SimpleNamespace(grid=grid)
    prefill = Prefill(
        view=view,
        calls=calls,
        logits=torch.zeros(1, 8),
        tokens=tokens,
        ids=torch.zeros(1, tokens, dtype=torch.long),
        rope_deltas=None,
        text=torch.ones(tokens, dtype=torch.bool) if text is None else text,
        decoder_input=DecoderInput(None, rotation or still(tokens, dim)),
    )
    return PromptView(torch.nn.Identity(), prefill, share)


def still(tokens: int, dim: int) -> Rotation:
    """A rotation by no angle."""
    return Rotation(torch.ones(tokens, dim), torch.zeros(tokens, dim))


def random_prompt(
    seed: int,
    tokens: int,
    share: float,
    layers: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 8,
) -> PromptView:
    """Normal queries, keys and values; a random part of the tokens is text, the last one always."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(layers, heads, tokens, dim, generator=generator)

    text = torch.rand(tokens, generator=generator) < torch.rand(1, generator=generator)
    text[-1] = True
    key = draw(kv_heads)
    return prompt_of(draw(kv_heads * group), key, draw(kv_heads), share, text)


def with_values_as_numbers(prompt: PromptView) -> PromptView:
    """Every value vector replaced by its token's number, so that kept tokens can be told."""
    for call in prompt.prefill.calls:
        number = torch.arange(prompt.tokens, dtype=torch.float32)
        call.value.copy_(number[None, None, :, None].expand_as(call.value))
    return prompt


def kept(prompt: PromptView, selection: Selection) -> list[list[list[int]]]:
    """Token numbers of every head, from values that are numbers."""
    return [[[int(v) for v in _kept(c).value[:, 0]] for c in layer] for layer in selection]


def counts(selection: Selection) -> list[list[int]]:
    """How many tokens every head keeps."""
    return [[len(_kept(choice).key) for choice in layer] for layer in selection]


def _kept(choice: Any) -> Kept:
    assert isinstance(choice, Kept)
    assert len(choice.key) == len(choice.value)
    return choice
