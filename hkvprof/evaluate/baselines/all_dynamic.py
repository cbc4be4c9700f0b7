"""Ablation: every head retrieves."""

from __future__ import annotations

from hkvprof.errors import BudgetError
from hkvprof.evaluate.baselines.base import Prompt, Selection, ablation
from hkvprof.evaluate.baselines.planned import allocated, even, measured_profile, only, planned
from hkvprof.heads import HeadType


@ablation("all_dynamic", "hkvprof, all heads dynamic")
def all_dynamic(prompt: Prompt) -> Selection:
    """Budgets and index sizes per head as the profile plans them, dynamic strategies alone.

    Where that fails (the ratios measured are too coarse for what the indexes need), all heads get
    the same share. Raises BudgetError where the smallest index does not fit into it.
    """
    profile = only(measured_profile(prompt, "all_dynamic"), HeadType.DYNAMIC)
    try:
        return planned(profile, allocated(prompt, profile))
    except BudgetError:
        return even(prompt, profile)
