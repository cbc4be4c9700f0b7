"""Which prompts a profile serves at its own budget, in words."""

from __future__ import annotations

from hkvprof.profile.capacity import Reach, find_reach
from hkvprof.profile.record import Profile
from hkvprof.profile.upgrade import tokens_told


def reach(profile: Profile) -> Reach:
    """Looked for by planning; the calibration's shortest prompt is that of the provenance."""
    shortest = tokens_told(profile.provenance, "min") or int(profile.lengths[0])
    ends = profile.keep.sinks + profile.keep.recent
    chunks = sorted({strategy.chunk for strategy in profile.strategies if strategy.index})
    return find_reach(profile.allocation, profile.default_budget, shortest, ends, chunks)


def unserved(profile: Profile) -> str:
    """What to know where the calibration's own prompts are too short; empty where they are not."""
    found = reach(profile)
    if found.covers_calibration:
        return ""
    budget = f"The default budget of {100 * found.budget:.3g}%"
    need = (
        "no prompt" if found.shortest is None else f"prompts of {found.shortest:,} tokens and more"
    )
    advice = "" if found.needed is None else f"; those need a budget of {100 * found.needed:.3g}%"
    return (
        f"{budget} serves {need}, and the shortest calibrated one has {found.calibrated:,}{advice} "
        "(shorter ones raise BudgetError, or stay dense under strict=False)"
    )
