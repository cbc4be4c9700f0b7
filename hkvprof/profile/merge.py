"""From the rows of all samples to a profile."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.artifact import Profile, ProjectedIndexTables
from hkvprof.errors import UsageError
from hkvprof.policy.budget import INFEASIBLE
from hkvprof.policy.planning import Menu, plan_anew
from hkvprof.profile import classify
from hkvprof.profile.conditions import Conditions
from hkvprof.profile.rows import SampleRow, gather

THETA_KAPPA = 0.10
"""The kappa whose sparsity HybridKV's rule looks at."""


@dataclass(frozen=True)
class Decision:
    """What is decided after measuring: theta of the recipe `paper`, the default budget; `seed`
    and `skipped` samples are only recorded. Raises UsageError for numbers out of range."""

    theta: float = 0.9
    budget: float = 0.10
    seed: int = 0
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.theta <= 1:
            raise UsageError(f"theta must lie in (0, 1], found {self.theta}")
        if not 0 < self.budget <= 1:
            raise UsageError(f"the default budget must be a share in (0, 1], found {self.budget}")


def merge(folders: Iterable[str | Path], decision: Decision | None = None) -> Profile:
    """A profile of the rows in these folders (`calibrate(rows=...)`, `measure`); needs no model.

    The same rows give the same profile, in whatever folders they lie. Raises UsageError where
    folders do not belong together or are damaged.
    """
    conditions, rows, tables = gather(Path(folder) for folder in folders)
    if tables is None and conditions.recipe == "measured":
        raise UsageError("the folders hold no index tables: measure again with the same options")
    return build_profile(conditions, rows, tables, decision or Decision())


def build_profile(
    conditions: Conditions,
    rows: list[SampleRow],
    tables: ProjectedIndexTables | None,
    decision: Decision,
) -> Profile:
    """Merge the rows (sorted by id) in float64, decide types and budgets for the default share.

    The default decision is made for the mean prompt length, or for the shortest at which the share
    holds sinks and recent tokens; other lengths and budgets are planned when they are met.
    """
    ratios = np.array(conditions.ratios, dtype=np.float32)
    stacked = np.stack([row.sparsity for row in rows]).astype(np.float64)
    mean, std = (f(stacked, axis=0).astype(np.float32) for f in (np.mean, np.std))
    curves = classify.Curves(*_mean_losses(rows))
    loss = classify.planning_loss(curves, ratios)
    keep, grid = conditions.keep, conditions.grid
    tokens = max(
        math.ceil(float(np.mean([row.tokens for row in rows]))),
        math.ceil(keep.floor_tokens / decision.budget) + 1,
    )
    menu = Menu(conditions.strategies, keep, grid.head_dim, tokens, conditions.itemsize)
    if conditions.recipe == "paper":
        at = conditions.kappas.index(THETA_KAPPA)
        types = classify.classify_by_sparsity(mean[at], std[at], len(rows), decision.theta, grid)
        chosen = classify.allocate_by_sparsity(types, mean[at], decision.budget, menu.floor, grid)
    else:
        chosen = plan_anew(menu, loss, ratios, decision.budget)
    return Profile(
        fingerprint=conditions.fingerprint,
        recipe=conditions.recipe,
        default_budget=decision.budget,
        keep=keep,
        strategies=conditions.strategies,
        kappas=conditions.kappas,
        ratios=ratios,
        strategy=chosen.strategy,
        budget=chosen.ratio,
        sparsity_mean=mean,
        sparsity_std=std,
        loss=loss,
        output_error=curves.output.astype(np.float32),
        index=tables,
        provenance=_provenance(conditions, rows, decision),
    )


def _mean_losses(rows: list[SampleRow]) -> NDArray[np.float64]:
    """[3, strategies, layers, kv_heads, ratios]: means over the samples where a point fits.

    A point that does not fit most samples is INFEASIBLE.
    """
    stacked = np.stack([row.losses for row in rows]).astype(np.float64)
    fits = stacked[:, :1] < INFEASIBLE
    count = fits.sum(axis=0)
    total = np.where(fits, stacked, 0).sum(axis=0)
    mean = total / np.maximum(count, 1)
    return np.where(count * 2 > len(rows), mean, float(INFEASIBLE))


def _provenance(
    conditions: Conditions, rows: list[SampleRow], decision: Decision
) -> dict[str, Any]:
    tasks = [row.task for row in rows]
    tokens = [row.tokens for row in rows]
    return {
        "samples": len(rows),
        "tasks": {task: tasks.count(task) for task in sorted(set(tasks))},
        "tokens": {
            "min": min(tokens),
            "mean": round(float(np.mean(tokens)), 1),
            "max": max(tokens),
        },
        "skipped": len(decision.skipped),
        **({"skipped_ids": list(decision.skipped)} if decision.skipped else {}),
        "theta": decision.theta,
        "theta_kappa": THETA_KAPPA,
        "seed": decision.seed,
        "replies": conditions.replies,
        "dtype": conditions.dtype,
        "versions": dict(conditions.versions),
    }
