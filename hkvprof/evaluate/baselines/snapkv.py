"""SnapKV: what the last rows of the prompt attend to."""

from __future__ import annotations

from hkvprof.evaluate.baselines.base import PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import keep_best, same_room, snapkv_scores, with_recent


@baseline("snapkv", "SnapKV", "arXiv 2404.14469")
def snapkv(prompt: PromptView) -> Selection:
    """The observation window, and the best-scored tokens before it; every head alike."""
    scores = prompt.remember("snapkv", lambda: [snapkv_scores(layer) for layer in prompt.layers])
    scores = [with_recent(prompt, score) for score in scores]
    return keep_best(prompt, scores, same_room(prompt))
