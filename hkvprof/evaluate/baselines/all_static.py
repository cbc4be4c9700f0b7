"""Ablation: no head retrieves."""

from __future__ import annotations

from hkvprof.evaluate.baselines.base import Prompt, Selection, ablation
from hkvprof.evaluate.baselines.planned import allocated, measured_profile, only, planned
from hkvprof.heads import HeadType


@ablation("all_static", "hkvprof, all heads static")
def all_static(prompt: Prompt) -> Selection:
    """Budgets and pooling widths per head as the profile plans them, static strategies alone."""
    profile = only(measured_profile(prompt, "all_static"), HeadType.STATIC)
    return planned(profile, allocated(prompt, profile))
