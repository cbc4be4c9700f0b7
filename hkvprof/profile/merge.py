"""From the rows of all samples to a profile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import hkvprof
from hkvprof.artifact import Profile, ProjectedIndexTables
from hkvprof.policy.budget import INFEASIBLE
from hkvprof.policy.planning import Menu, plan_anew
from hkvprof.profile import classify
from hkvprof.profile.probe import KAPPAS, RATIOS, Bench, SampleRow

THETA_KAPPA = 0.10
"""The kappa whose sparsity HybridKV's rule looks at."""


@dataclass(frozen=True)
class Decision:
    """How a run decides: its options, and the samples it left out."""

    recipe: str
    theta: float
    budget: float
    seed: int
    skipped: tuple[str, ...]


def build_profile(
    bench: Bench,
    rows: list[SampleRow],
    tables: ProjectedIndexTables | None,
    decision: Decision,
) -> Profile:
    """Merge the rows (sorted by id) in float64, decide types and budgets for the default share.

    The default decision is made for the mean prompt length, or for the shortest at which the share
    holds sinks and recent tokens; other lengths and budgets are planned when they are met.
    """
    ratios = np.array(RATIOS, dtype=np.float32)
    stacked = np.stack([row.sparsity for row in rows]).astype(np.float64)
    mean, std = (f(stacked, axis=0).astype(np.float32) for f in (np.mean, np.std))
    curves = classify.Curves(*_mean_losses(rows))
    loss = classify.planning_loss(curves, ratios)
    tokens = max(
        math.ceil(float(np.mean([row.tokens for row in rows]))),
        math.ceil(bench.keep.floor_tokens / decision.budget) + 1,
    )
    itemsize = torch.empty(0, dtype=bench.model.dtype).element_size()
    menu = Menu(bench.menu, bench.keep, bench.view.grid.head_dim, tokens, itemsize)
    if decision.recipe == "paper":
        at, grid = KAPPAS.index(THETA_KAPPA), bench.view.grid
        types = classify.classify_by_sparsity(mean[at], std[at], len(rows), decision.theta, grid)
        chosen = classify.allocate_by_sparsity(types, mean[at], decision.budget, menu.floor, grid)
    else:
        chosen = plan_anew(menu, loss, ratios, decision.budget)
    return Profile(
        fingerprint=bench.view.fingerprint,
        recipe=decision.recipe,
        default_budget=decision.budget,
        keep=bench.keep,
        strategies=bench.menu,
        kappas=KAPPAS,
        ratios=ratios,
        strategy=chosen.strategy,
        budget=chosen.ratio,
        sparsity_mean=mean,
        sparsity_std=std,
        loss=loss,
        output_error=curves.output.astype(np.float32),
        index=tables,
        provenance=_provenance(bench, rows, decision),
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


def _provenance(bench: Bench, rows: list[SampleRow], decision: Decision) -> dict[str, Any]:
    import transformers

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
        "replies": "own" if bench.own_replies else "given",
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "versions": {
            "hkvprof": hkvprof.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }
