"""ChunkKV: whole chunks of neighbouring tokens stay or go."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hkvprof.evaluate.baselines.base import PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import keep_best, same_room, snapkv_scores, with_recent

CHUNK = 10


@baseline("chunkkv", "ChunkKV (SnapKV)", "arXiv 2502.00299")
def chunkkv(prompt: PromptView) -> Selection:
    """A chunk of 10 tokens scores what its tokens score on average (SnapKV's, not pooled).

    The last chunk that fits is kept in part, from its beginning, so that the room is used up; the
    observation window always stays. No layer reuses another's choice.
    """
    scores = prompt.remember(
        "chunkkv", lambda: [by_chunk(snapkv_scores(layer, width=1)) for layer in prompt.layers]
    )
    return keep_best(prompt, [with_recent(prompt, score) for score in scores], same_room(prompt))


def by_chunk(score: Float[Tensor, "kv_heads tokens"]) -> Float[Tensor, "kv_heads tokens"]:
    """Every token's score is the mean of its chunk; the last chunk may be shorter."""
    means = [chunk.mean(dim=-1, keepdim=True).expand_as(chunk) for chunk in score.split(CHUNK, -1)]
    return torch.cat(means, dim=-1)
