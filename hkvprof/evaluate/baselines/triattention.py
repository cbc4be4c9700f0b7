"""TriAttention: keys are scored by where queries lie before rotation, and by their distance."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hkvprof.evaluate.baselines.base import LayerPrompt, PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import keep_best, same_room, with_recent
from hkvprof.models.decoder_input import Rotation

FARTHEST = 65_536
"""The scores are a mean over distances to come, which double from 1 up to this one."""


@baseline("triattention", "TriAttention-like", "arXiv 2604.04921")
def triattention(prompt: PromptView) -> Selection:
    """The mean query turned to positions to come, and what its norms say beyond the mean.

    A query head's scores are compared with each other (mean 0, deviation 1), and a token has the
    best of its group. Means are of the prompt's own queries, where the original calibrates them
    offline, and the recent tokens stay: both serve the method here. Raises ModelError for models
    without rotary embeddings.
    """
    rotation = prompt.rotation("triattention")
    scores = prompt.remember(
        "triattention", lambda: [best_of_group(layer, rotation) for layer in prompt.layers]
    )
    return keep_best(prompt, [with_recent(prompt, s) for s in scores], same_room(prompt))


def best_of_group(layer: LayerPrompt, rotation: Rotation) -> Float[Tensor, "kv_heads tokens"]:
    """Standardised scores, the largest of the query heads that share a key."""
    group = len(layer.query) // len(layer.key)
    key = layer.key.float().repeat_interleave(group, dim=0)
    score = head_scores(rotation.undo(layer.query), key, rotation)
    spread = score.std(dim=-1, keepdim=True).clamp(min=1e-12)
    score = (score - score.mean(dim=-1, keepdim=True)) / spread
    return score.view(len(layer.key), group, -1).amax(dim=1)


def head_scores(
    query: Float[Tensor, "heads tokens dim"],
    key: Float[Tensor, "heads tokens dim"],
    rotation: Rotation,
) -> Float[Tensor, "heads tokens"]:
    """Trigonometric part plus norm part of every rotated key, by queries before their rotation.

    The published sum over bands, |mean q| |k| cos(distance * frequency + phase), is the product of
    the key with the mean query, rotated to where it would stand; bands that are not rotated count
    as they are.
    """
    mean = query.mean(dim=1)
    trigonometric = (key @ _turned(mean, rotation)[..., None])[..., 0]
    norms = _norms(query, rotation).mean(dim=1) - _norms(mean, rotation)
    return trigonometric + (_norms(key, rotation) @ norms[..., None])[..., 0]


def _turned(mean: Float[Tensor, "heads dim"], rotation: Rotation) -> Float[Tensor, "heads dim"]:
    """The mean query at positions after the prompt, averaged over their distances."""
    angles = torch.atan2(rotation.sin, rotation.cos)
    doublings = torch.arange(FARTHEST.bit_length(), device=angles.device)
    ahead = angles[-1] + (angles[1] - angles[0]) * (2.0**doublings)[:, None]
    scale = torch.hypot(rotation.sin[-1], rotation.cos[-1])
    cos, sin = scale * ahead.cos().mean(dim=0), scale * ahead.sin().mean(dim=0)
    part, rest = mean[:, : len(cos)], mean[:, len(cos) :]
    first, second = part.chunk(2, dim=-1)
    return torch.cat([part * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def _norms(x: Float[Tensor, "*rows dim"], rotation: Rotation) -> Float[Tensor, "*rows bands"]:
    """Length of every band: two channels that rotate together."""
    first, second = x[..., : rotation.cos.shape[-1]].chunk(2, dim=-1)
    return torch.hypot(first, second)
