"""Ablation: shares per head, but one static strategy for all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hkvprof.evaluate.baselines.base import Prompt, Selection, ablation
from hkvprof.evaluate.baselines.planned import allocated, loss_at, measured_profile, planned
from hkvprof.heads import HeadType


@ablation("no_type_level", "hkvprof, one static strategy for all heads")
def no_type_level(prompt: Prompt) -> Selection:
    """Shares as the profile plans them with all strategies; every head then prunes the same way.

    The way is the static strategy whose losses at these shares sum to the least.
    """
    profile = measured_profile(prompt, "no_type_level")
    allocation = allocated(prompt, profile)
    static = [
        number
        for number, strategy in enumerate(profile.strategies)
        if strategy.head_type is HeadType.STATIC
    ]
    ratio = allocation.ratio.astype(np.float64)
    best = min(static, key=lambda number: loss_at(profile, number, ratio, prompt.tokens).sum())
    same = np.full_like(allocation.strategy, best)
    return planned(profile, replace(allocation, strategy=same))
