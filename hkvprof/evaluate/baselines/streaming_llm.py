"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

import torch

from hkvprof.evaluate.baselines.base import PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import SINKS


@baseline("streaming_llm", "StreamingLLM", "arXiv 2309.17453")
def streaming_llm(prompt: PromptView) -> Selection:
    """The first 4 tokens and the last ones, as many as there is room for."""
    sinks = min(SINKS, prompt.room // 2)
    recent = prompt.room - sinks
    ends = torch.cat([torch.arange(sinks), torch.arange(prompt.tokens - recent, prompt.tokens)])
    kept = ends.to(prompt.device)
    return [
        [layer.keep(head, kept) for head in range(prompt.grid.kv_heads)] for layer in prompt.layers
    ]
