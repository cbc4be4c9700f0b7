"""The figures of the report in HTML, as plain JSON: heads, curves, and a grid of plans.

Pure functions. What the page lets a reader choose is computed here in advance, so that it needs no
program behind it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import BudgetError
from hkvprof.heads import HeadType
from hkvprof.profile.budgets import INFEASIBLE, Fetch
from hkvprof.profile.forecast import WHOLE, Forecast
from hkvprof.profile.record import Profile
from hkvprof.profile.tables import CLASSES, PAIRS
from hkvprof.report.measured import covering
from hkvprof.report.summary import ITEM_BYTES, kappa_index

BUDGETS = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75)
"""Shares of dense bytes that the page's slider offers, beside the profile's default."""
FETCHES = ("0", "0.1%", "0.5%", "1%", "2%", "5%", "10%", "unlimited")
"""What a step may read from the host, from nothing on, as the page's other slider offers it."""
KNEE = "knee"
"""The default reads, where the curve of loss over reads bends."""
DIGITS = 4
_LETTERS = {"static": "s", "dynamic": "d", WHOLE: "w"}


def figures(profile: Profile) -> dict[str, Any]:
    """Everything that the page draws, JSON-ready; parts that were not measured are None."""
    grid = profile.grid
    return {
        "layers": grid.layers,
        "kv_heads": grid.kv_heads,
        "group": grid.group,
        "tokens": profile.usual_tokens,
        "default_budget": profile.default_budget,
        "types": [[HeadType(t).name.lower() for t in row] for row in profile.head_types.tolist()],
        "budget": rounded(profile.budget),
        "strategy": profile.strategy.tolist(),
        "strategies": [one.name for one in profile.strategies],
        "query_maps": _query_maps(profile),
        "curves": _curves(profile),
        "plans": _plans(profile),
    }


def _query_maps(profile: Profile) -> list[dict[str, Any]]:
    """Heat maps over query heads: sparsity, modalities, entropy and drift."""
    maps = []
    kappa = kappa_index(profile)
    if kappa is not None and profile.recipe != "uniform":
        share = f"{100 * profile.kappas[kappa]:g}%"
        maps.append(_map(f"Sparsity: attention on the top {share} of keys",
                         profile.sparsity_mean[kappa], profile.sparsity_std[kappa]))  # fmt: skip
    measured = profile.statistics
    if measured is None:
        return maps
    for number, name in enumerate(CLASSES):
        mean, spread = measured.modality_mass_mean[number], measured.modality_mass_std[number]
        if mean.any():
            maps.append(_map(f"Modality: attention on {name}", mean, spread))
    maps.append(_map("Entropy of attention", measured.entropy_mean, measured.entropy_std))
    for number, pair in enumerate(PAIRS):
        samples = int(measured.drift_samples[number])
        if samples:
            title = f"Drift: same top tokens, {pair.replace('_', ' and ')} ({samples} samples)"
            maps.append(_map(title, measured.drift_mean[number], None))
    return maps


def _map(
    title: str, mean: NDArray[np.float32], spread: NDArray[np.float32] | None
) -> dict[str, Any]:
    std = None if spread is None else rounded(spread)
    return {"title": title, "mean": rounded(mean), "std": std}


def _curves(profile: Profile) -> dict[str, Any] | None:
    """Loss [strategy][layer][KV head][ratio]; None where a strategy does not fit."""
    if not profile.has_curves:
        return None
    loss = profile.loss_at(profile.usual_tokens)
    told = np.where(loss >= INFEASIBLE, np.nan, loss.astype(np.float64))
    return {"ratios": rounded(profile.ratios), "loss": rounded(told)}


def _plans(profile: Profile) -> dict[str, Any]:
    """A plan, or why there is none, for every pair of BUDGETS and FETCHES (and the knee)."""
    budgets = sorted({*BUDGETS, round(profile.default_budget, DIGITS)})
    fetches = [KNEE, *FETCHES]
    cells = [[_cell(profile, budget, fetch) for fetch in fetches] for budget in budgets]
    found = [[_found(profile, budget, fetch) for fetch in fetches] for budget in budgets]
    return {"budgets": budgets, "fetches": fetches, "cells": cells, "quality": found}


def _found(profile: Profile, budget: float, fetch: str) -> str:
    """What the certificate says of answers at a budget with these reads; empty without one."""
    known = covering(profile, Fetch.parse(None if fetch == KNEE else fetch))
    return known.at(budget) if known else ""


def _cell(profile: Profile, budget: float, fetch: str) -> dict[str, Any]:
    try:
        plan = profile.plan(
            budget, profile.usual_tokens, ITEM_BYTES, fetch=None if fetch == KNEE else fetch
        )
    except BudgetError as error:
        return {"error": str(error)}
    return _told(plan)


def _told(plan: Forecast) -> dict[str, Any]:
    heads = [head for layer in plan.layers for head in layer.heads]
    loss = plan.relative_loss if plan.relative_loss is not None else plan.expected_loss
    return {
        "dense": plan.dense_bytes,
        "resident": plan.resident_bytes,
        "tables": plan.table_bytes,
        "host": plan.host_bytes,
        "read": round(plan.read_bytes),
        "most": plan.most_read_bytes,
        "static": rounded(plan.static_share),
        "loss": None if loss is None else rounded(loss),
        "kinds": "".join(_LETTERS[head.kind] for head in heads),
        "ratios": rounded(np.array([head.ratio for head in heads])),
    }


def rounded(values: Any) -> Any:
    """A number or nested lists of them, with four significant digits; None for what is none."""
    if isinstance(values, np.ndarray):
        return [rounded(entry) for entry in values.tolist()]
    if isinstance(values, list):
        return [rounded(entry) for entry in values]
    value = float(values)
    return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
