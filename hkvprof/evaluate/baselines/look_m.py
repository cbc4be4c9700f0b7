"""LOOK-M: text first, and evicted tokens live on in those that look like them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.evaluate.baselines.base import Kept, LayerPrompt, PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import best_tokens, snapkv_of

BLOCK = 4096
"""Evicted tokens that are compared with the kept ones at a time."""


@baseline("look_m", "LOOK-M", "arXiv 2406.18139")
def look_m(prompt: PromptView) -> Selection:
    """Recent tokens, then text, then vision, each by score; pivotal merging of what goes.

    Two things serve the method better here than what is published: scores are SnapKV's, not
    attention summed over all rows; and where the text alone exceeds the room, so that no vision
    token would be left, the text has no precedence. Evicted vision tokens are merged, text is not.
    """
    return [
        [merged(prompt, layer, head, row) for head, row in enumerate(preferred(prompt, score))]
        for layer, score in zip(prompt.layers, snapkv_of(prompt), strict=True)
    ]


def preferred(
    prompt: PromptView, score: Float[Tensor, "kv_heads tokens"]
) -> Float[Tensor, "kv_heads tokens"]:
    """The scores, those of text above all others if there is room for all of it."""
    if int(prompt.text.sum()) > prompt.room:
        return score
    return score + prompt.text.to(score.device) * (1 + score[score.isfinite()].max())


def merged(
    prompt: PromptView, layer: LayerPrompt, head: int, score: Float[Tensor, " tokens"]
) -> Kept:
    """The best-scored tokens of a head, the other vision tokens merged into them."""
    kept = best_tokens(score, prompt.room)
    gone = ~prompt.text.to(score.device)
    gone[kept] = False
    key, value = layer.key[head].float(), layer.value[head].float()
    target = _nearest(key[gone], key[kept])
    key, value = (_pivotal(x[kept], x[gone], target) for x in (key, value))
    return Kept(key.to(layer.key.dtype), value.to(layer.key.dtype))


def _nearest(
    gone: Float[Tensor, "gone dim"], kept: Float[Tensor, "kept dim"]
) -> Int[Tensor, " gone"]:
    """For every evicted key, the number of the kept one with the largest cosine."""
    direction = torch.nn.functional.normalize(kept, dim=-1)
    parts = [(part @ direction.T).argmax(dim=-1) for part in gone.split(BLOCK)]
    return torch.cat(parts) if parts else gone.new_zeros(0, dtype=torch.long)


def _pivotal(
    kept: Float[Tensor, "kept dim"], gone: Float[Tensor, "gone dim"], target: Int[Tensor, " gone"]
) -> Float[Tensor, "kept dim"]:
    """Mean of a kept vector and of its averages with every vector that is merged into it."""
    total = kept.index_add(0, target, (gone + kept[target]) / 2)
    count = torch.ones(len(kept), device=kept.device)
    count.index_add_(0, target, torch.ones(len(gone), device=kept.device))
    return total / count[:, None]
