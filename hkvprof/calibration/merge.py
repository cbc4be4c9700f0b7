"""From the rows of all samples to a profile."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hkvprof.calibration.attention import mean_statistics
from hkvprof.calibration.conditions import Conditions
from hkvprof.calibration.confidence import assess
from hkvprof.calibration.evidence import Decision, Evidence, Plan
from hkvprof.calibration.rows import SampleRow, gather
from hkvprof.errors import UsageError
from hkvprof.profile.confidence import KEY
from hkvprof.profile.domain import KEY as DOMAIN
from hkvprof.profile.domain import Domain
from hkvprof.profile.record import Profile
from hkvprof.profile.tables import ProjectedIndexTables
from hkvprof.samples.record import SAMPLES_KEY, short_digest


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
    """Merge the rows in float64, decide types and budgets for the default share, and how sure.

    The default decision is made for the mean prompt length, or for the shortest at which the share
    holds sinks and recent tokens; other lengths and budgets are planned when they are met.
    """
    decision.check(conditions.recipe)
    evidence = Evidence.of(conditions, rows, decision)
    sparsity = evidence.sparsity.astype(np.float64)
    plan = evidence.plan(evidence.everything)
    return Profile(
        fingerprint=conditions.fingerprint,
        recipe=conditions.recipe,
        default_budget=decision.budget,
        keep=conditions.keep,
        strategies=conditions.strategies,
        kappas=conditions.kappas,
        ratios=evidence.ratios,
        lengths=evidence.anchors.lengths,
        strategy=plan.chosen.strategy,
        budget=plan.chosen.ratio,
        sparsity_mean=np.mean(sparsity, axis=0).astype(np.float32),
        sparsity_std=np.std(sparsity, axis=0).astype(np.float32),
        loss=plan.loss,
        output_error=plan.curves.output.astype(np.float32),
        index=tables,
        statistics=mean_statistics(row.statistics for row in sorted(rows, key=lambda row: row.id)),
        rules=decision.rules,
        static_margin=plan.margin,
        provenance={
            **_provenance(conditions, rows, decision),
            **_in_doubt(evidence, plan),
            KEY: assess(evidence, plan).to_json(),
            DOMAIN: Domain.of(sparsity, any(row.context_tokens for row in rows)).to_json(),
        },
    )


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
        SAMPLES_KEY: sorted({short_digest(row.digest) for row in rows if row.digest}),
        "skipped": len(decision.skipped),
        **({"skipped_ids": list(decision.skipped)} if decision.skipped else {}),
        "theta": decision.theta,
        "theta_kappa": decision.kappa,
        "coefficient": decision.coefficient,
        "risk": str(decision.risk),
        "seed": decision.seed,
        "replies": conditions.replies,
        "dtype": conditions.dtype,
        "versions": dict(conditions.versions),
    }


def _in_doubt(evidence: Evidence, plan: Plan) -> dict[str, int]:
    """How many heads are dynamic at the default share because static was not proven better."""
    if plan.margin is None:
        return {}
    freely = evidence.chosen(plan.loss_here, None)
    return {"conservative": int((freely.strategy != plan.chosen.strategy).sum())}
