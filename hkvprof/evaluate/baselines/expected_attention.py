"""Expected Attention: what queries to come would attend to, from the statistics of past ones."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hkvprof.evaluate.baselines.base import LayerPrompt, PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import (
    SINKS,
    best_of_all,
    keep_marked,
    with_recent,
    with_sinks,
)
from hkvprof.models.decoder_input import Rotation

AHEAD = 512
"""Positions after the prompt over which the rotation is averaged."""
EPSILON = 0.02
SAFEGUARD = 0.2
"""Share of an even budget that every head has for sure."""


@baseline("expected_attention", "Expected Attention", "arXiv 2510.00636")
def expected_attention(prompt: PromptView) -> Selection:
    """Queries are taken as normal, with mean and covariance of the prompt's before rotation.

    The first 4 tokens are left out of the statistics and always kept; tokens compete across the
    heads of a layer as in Ada-KV. The recent tokens stay too, which is not in the paper: it serves
    the method better here. Raises ModelError for models without rotary embeddings.
    """
    rotation = prompt.rotation("expected_attention")
    scores = prompt.remember(
        "expected_attention", lambda: [expected(layer, rotation) for layer in prompt.layers]
    )
    total, safe = prompt.room * prompt.grid.kv_heads, max(1, int(SAFEGUARD * prompt.room))
    forced = [with_recent(prompt, with_sinks(prompt, score)) for score in scores]
    return keep_marked(prompt, [best_of_all(score, total, safe) for score in forced])


def expected(layer: LayerPrompt, rotation: Rotation) -> Float[Tensor, "kv_heads tokens"]:
    """(softmax of the expected logit + epsilon) times the value's norm, mean over the group.

    The expectation of exp(q k s) under a normal q is exp(mu k s + k' Sigma k s^2 / 2).
    """
    past = rotation.undo(layer.query)[:, min(SINKS, layer.query.shape[1] - 1) :]
    turn = torch.eye(past.shape[-1], device=past.device)
    mean_turn = rotation.ahead(AHEAD)
    turn[: len(mean_turn), : len(mean_turn)] = mean_turn
    mean = past.mean(dim=1, keepdim=True)
    spread = (past - mean) @ turn.T
    covariance = spread.transpose(1, 2) @ spread / past.shape[1]
    ahead = (mean @ turn.T)[:, 0]
    group = len(layer.query) // len(layer.key)
    scores = []
    for head, key in enumerate(layer.key.float()):
        mine = slice(head * group, (head + 1) * group)
        logits = ahead[mine] @ key.T * layer.scaling
        quadratic = ((key @ covariance[mine]) * key).sum(dim=-1)
        logits += quadratic * layer.scaling**2 / 2
        weight = logits[:, SINKS:].softmax(dim=-1).mean(dim=0)
        scores.append(torch.cat([weight.new_zeros(min(SINKS, len(key))), weight]))
    return (torch.stack(scores) + EPSILON) * layer.value.float().norm(dim=-1)
