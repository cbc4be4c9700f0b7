"""KIVI: every token stays, in few bits; keys by channel, values by token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hkvprof.errors import BudgetError
from hkvprof.evaluate.baselines.base import (
    Choice,
    Kept,
    LayerPrompt,
    PromptView,
    Selection,
    baseline,
)
from hkvprof.evaluate.baselines.codes import encode_groups, group_bytes

GROUP = 32
RESIDUAL = 32
"""Tokens that stay in 16 bits; published are 128 and 32, and 32 leaves short prompts more room."""


@baseline("kivi_int8", "KIVI-like, 8 bits", "arXiv 2402.02750")
def kivi_int8(prompt: PromptView) -> Selection:
    """All tokens in 8 bits, whatever more the budget holds; refused where it holds less."""
    return full_cache(prompt, 8)


@baseline("kivi_int4", "KIVI-like, 4 bits", "arXiv 2402.02750")
def kivi_int4(prompt: PromptView) -> Selection:
    """All tokens in 4 bits, whatever more the budget holds; refused where it holds less."""
    return full_cache(prompt, 4)


@baseline("kivi_int2", "KIVI-like, 2 bits", "arXiv 2402.02750")
def kivi_int2(prompt: PromptView) -> Selection:
    """All tokens in 2 bits, whatever more the budget holds; refused where it holds less."""
    return full_cache(prompt, 2)


def full_cache(prompt: PromptView, bits: int) -> Selection:
    """Every token of every head in the published format. Raises BudgetError if it does not fit."""
    stored = format_bytes(prompt.tokens, prompt.grid.head_dim, bits, prompt.itemsize)
    dense = prompt.tokens * prompt.token_bytes
    if stored > prompt.share * dense:
        raise BudgetError(
            f"all {prompt.tokens} tokens in {bits} bits take {stored / dense:.4f} of the dense "
            f"bytes, scales and the residual window included; the budget is {prompt.share:.4g}: "
            "raise it to that share, or leave this method out"
        )
    return prompt.remember(f"kivi {bits}", lambda: [coded(prompt, x, bits) for x in prompt.layers])


def coded(prompt: PromptView, layer: LayerPrompt, bits: int) -> list[Choice]:
    """All tokens of a layer's heads: full blocks of keys are coded, values but the last ones."""
    blocks, old = coded_tokens(prompt.tokens)
    key = with_coded_keys(layer.key, blocks, bits)
    value = with_coded_values(layer.value, old, bits)
    stored = format_bytes(prompt.tokens, key.shape[-1], bits, prompt.itemsize)
    return [Kept(*pair, stored) for pair in zip(key, value, strict=True)]


def coded_tokens(tokens: int) -> tuple[int, int]:
    """How many of a prompt's first keys are coded, and how many of its first values."""
    return tokens - tokens % RESIDUAL, max(0, tokens - RESIDUAL)


def format_bytes(tokens: int, dim: int, bits: int, itemsize: int) -> int:
    """Bytes of one head of so many tokens: codes, their constants, and what is not coded."""
    blocks, old = coded_tokens(tokens)
    keys = group_bytes(dim, blocks, bits, GROUP) + (tokens - blocks) * dim * itemsize
    return keys + group_bytes(old, dim, bits, GROUP) + (tokens - old) * dim * itemsize


def with_coded_keys(
    key: Float[Tensor, "heads tokens dim"], first: int, bits: int
) -> Float[Tensor, "heads tokens dim"]:
    """The keys, of which the first ones went through codes by channel, 32 tokens a group."""
    if not first:
        return key
    codes = encode_groups(key[:, :first].transpose(1, 2), bits, GROUP)
    return torch.cat([codes.decode().transpose(1, 2).to(key.dtype), key[:, first:]], dim=1)


def with_coded_values(
    value: Float[Tensor, "heads tokens dim"], first: int, bits: int
) -> Float[Tensor, "heads tokens dim"]:
    """The values, of which the first ones went through codes by token, 32 channels a group."""
    if not first:
        return value
    codes = encode_groups(value[:, :first], bits, GROUP)
    return torch.cat([codes.decode().to(value.dtype), value[:, first:]], dim=1)
