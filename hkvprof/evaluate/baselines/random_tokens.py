"""Random tokens: what any selection has to beat."""

from __future__ import annotations

import torch

from hkvprof.evaluate.baselines.base import PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import SINKS, keep_best, same_room, with_recent


@baseline("random", "random tokens", "none: a lower bound")
def random_tokens(prompt: PromptView) -> Selection:
    """Sinks, the last 16 tokens, and others drawn anew for every head."""
    generator = torch.Generator().manual_seed(prompt.seed)
    scores = []
    for _ in prompt.layers:
        score = torch.rand(prompt.grid.kv_heads, prompt.tokens, generator=generator)
        score[:, : min(SINKS, prompt.room // 4)] = torch.inf
        scores.append(with_recent(prompt, score).to(prompt.device))
    return keep_best(prompt, scores, same_room(prompt))
