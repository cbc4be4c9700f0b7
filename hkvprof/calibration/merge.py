"""Folders of rows become one, and the rows of all samples a profile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hkvprof.calibration.attention import mean_statistics
from hkvprof.calibration.confidence import assess
from hkvprof.calibration.evidence import Evidence, Judgement
from hkvprof.calibration.fitted import FittedTables
from hkvprof.calibration.recipe import Recipe
from hkvprof.calibration.rows import (
    INDEX,
    ROW_SCHEMA,
    Conditions,
    SampleRow,
    read_conditions,
    read_rows,
    read_tables,
)
from hkvprof.errors import UsageError
from hkvprof.profile.confidence import KEY
from hkvprof.profile.domain import KEY as DOMAIN
from hkvprof.profile.domain import Domain
from hkvprof.profile.record import Profile
from hkvprof.profile.sizes import KEY as SIZES
from hkvprof.samples.record import SAMPLES_KEY, short_digest

Gathered = tuple[Conditions, list[SampleRow], FittedTables | None]
_MOST_NAMED = 5


def merge(folders: Iterable[str | Path], recipe: Recipe | None = None) -> Profile:
    """A profile of the rows in these folders (`calibrate(rows=...)`, `measure`); needs no model.

    `recipe` is the one that they were measured by (`measured_by`), which is also the default, with
    what is decided after measuring: budget, theta, coefficient, and a kappa
    among those measured. The same rows give the same profile, in whatever folders they lie. Raises
    UsageError where folders do not belong together, were measured by another recipe, or are
    damaged.
    """
    conditions, rows, tables = gather(Path(folder) for folder in folders)
    if tables is None and conditions.recipe == "measured":
        raise UsageError("the folders hold no index tables: measure again with the same options")
    if recipe is not None:
        _check_recipe(recipe, conditions.measured_by)
    return build_profile(conditions, rows, tables, recipe or conditions.measured_by)


def measured_by(folder: str | Path) -> Recipe:
    """The recipe by which the rows of a folder were measured. Raises UsageError."""
    return read_conditions(Path(folder)).measured_by


def _check_recipe(recipe: Recipe, measured: Recipe) -> None:
    names = ("name", "replies", "keep_rule", "chunk", "text_prior")
    differing = [name for name in names if getattr(recipe, name) != getattr(measured, name)]
    if differing:
        told = ", ".join(f"{name} {getattr(measured, name)!r}" for name in differing)
        raise UsageError(
            f"the rows were measured with {told}, and the recipe says otherwise: start from "
            "calibration.merge.measured_by(folder)"
        )


def build_profile(
    conditions: Conditions,
    rows: Sequence[SampleRow],
    tables: FittedTables | None,
    recipe: Recipe,
    skipped: Sequence[str] = (),
) -> Profile:
    """Merge the rows in float64, decide types and budgets for the default share, and how sure.

    The default decision is made for the mean prompt length, or for the shortest at which the share
    holds sinks and recent tokens; other lengths and budgets are planned when they are met.
    `skipped` are the ids of samples that could not be used; they are only recorded.
    """
    evidence = Evidence.of(conditions, rows, recipe)
    sparsity = evidence.sparsity.astype(np.float64)
    judgement = evidence.judge(evidence.everything)
    return Profile(
        fingerprint=conditions.fingerprint,
        recipe=conditions.recipe,
        default_budget=recipe.budget,
        keep=conditions.keep,
        strategies=conditions.strategies,
        kappas=conditions.kappas,
        ratios=evidence.ratios,
        lengths=evidence.anchors.lengths,
        strategy=judgement.chosen.strategy,
        budget=judgement.chosen.ratio,
        sparsity_mean=np.mean(sparsity, axis=0).astype(np.float32),
        sparsity_std=np.std(sparsity, axis=0).astype(np.float32),
        loss=judgement.loss,
        output_error=judgement.curves.output.astype(np.float32),
        index=None if tables is None else tables.index,
        queries=None if tables is None else tables.queries,
        statistics=mean_statistics(row.statistics for row in sorted(rows, key=lambda row: row.id)),
        static_margin=judgement.margin,
        provenance={
            **_provenance(conditions, rows, recipe, skipped),
            **_in_doubt(evidence, judgement),
            KEY: assess(evidence, judgement).to_json(),
            DOMAIN: Domain.of(sparsity, any(row.context_tokens for row in rows)).to_json(),
        },
    )


def _provenance(
    conditions: Conditions, rows: Sequence[SampleRow], recipe: Recipe, skipped: Sequence[str]
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
        "skipped": len(skipped),
        **({"skipped_ids": list(skipped)} if skipped else {}),
        "theta": recipe.theta,
        "theta_kappa": recipe.kappa,
        "coefficient": recipe.coefficient,
        "risk": "mean",  # of all samples; profiles of earlier versions may say another
        "seed": recipe.seed,
        "replies": conditions.replies,
        "dtype": conditions.dtype,
        "versions": dict(conditions.versions),
        **({} if conditions.sizes is None else {SIZES: conditions.sizes.to_json()}),
    }


def _in_doubt(evidence: Evidence, judgement: Judgement) -> dict[str, int]:
    """How many heads are dynamic at the default share because static was not proven better."""
    if judgement.margin is None:
        return {}
    freely = evidence.chosen(judgement.loss_here, None)
    return {"conservative": int((freely.strategy != judgement.chosen.strategy).sum())}


# -- folders that belong together -----------------------------------------------------------------


def gather(folders: Iterable[Path]) -> Gathered:
    """Conditions, rows (sorted by id) and index tables of folders that belong together.

    Raises UsageError where conditions or tables differ, or a sample lies in two folders.
    """
    paths = list(folders)
    _check_distinct(paths)
    conditions = read_conditions(paths[0])
    if conditions.row_schema != ROW_SCHEMA:
        raise UsageError(
            f"{paths[0]} holds rows of version {conditions.row_schema}, and this hkvprof reads "
            f"{ROW_SCHEMA}: measure again"
        )
    rows: dict[str, SampleRow] = {}
    origin: dict[str, Path] = {}
    tables: FittedTables | None = None
    for path in paths:
        if differing := conditions.differences(read_conditions(path)):
            raise UsageError(
                f"{paths[0]} and {path} were measured under different conditions "
                f"({', '.join(differing)}): their rows cannot be merged"
            )
        held = read_rows(path, conditions)
        _check_overlap([row.id for row in held], origin, path)
        rows |= {row.id: row for row in held}
        origin |= {row.id: path for row in held}
        if (path / INDEX).exists():
            own, _ = read_tables(path, conditions)
            if tables is not None and not _same_tables(tables, own):
                raise UsageError(
                    f"{path}: its index differs from that of the folders before it, and rows "
                    "depend on the index: measure all shards with the same --data"
                )
            tables = own
    if not rows:
        raise UsageError(f"{', '.join(map(str, paths))}: no rows yet")
    return conditions, sorted(rows.values(), key=lambda row: row.id), tables


def _check_distinct(paths: list[Path]) -> None:
    if not paths:
        raise UsageError("there is nothing to merge: name one or more folders of rows")
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"{path} is given {places.count(place)} times: name each folder once")


def _check_overlap(samples: list[str], origin: dict[str, Path], path: Path) -> None:
    """A sample must count once: also where its rows are equal, the folders overlap by mistake."""
    twice = [sample for sample in samples if sample in origin]
    if not twice:
        return
    named = ", ".join(map(repr, twice[:_MOST_NAMED]))
    more = f" and {len(twice) - _MOST_NAMED} more" if len(twice) > _MOST_NAMED else ""
    raise UsageError(
        f"{origin[twice[0]]} and {path} both hold sample{'s'[: len(twice) > 1]} {named}{more}: a "
        "sample counts once; give different samples different ids, or leave one folder out"
    )


def _same_tables(first: FittedTables, second: FittedTables) -> bool:
    ours, theirs = first.tensors(), second.tensors()
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)
