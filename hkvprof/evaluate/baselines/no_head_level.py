"""Ablation: types per head, but the same share for all."""

from __future__ import annotations

from hkvprof.evaluate.baselines.base import Prompt, Selection, ablation
from hkvprof.evaluate.baselines.planned import even, measured_profile


@ablation("no_head_level", "hkvprof, same share for every head")
def no_head_level(prompt: Prompt) -> Selection:
    """Every head takes the strategy that loses least at the common share."""
    return even(prompt, measured_profile(prompt, "no_head_level"))
