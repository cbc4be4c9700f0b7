"""Rows made up for tests: what every sample wants is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hkvprof.calibration import confidence
from hkvprof.calibration.attention import SampleStatistics
from hkvprof.calibration.evidence import Evidence
from hkvprof.calibration.recipe import KAPPAS, RATIOS, Recipe, RecipeName
from hkvprof.calibration.rows import Conditions, SampleRow
from hkvprof.heads import HeadGrid, HeadType, KeepRule, Strategy
from hkvprof.profile.confidence import Comparison, Confidence
from hkvprof.profile.tables import CLASSES, PAIRS
from tests.profiles import fingerprint

S, D = HeadType.STATIC, HeadType.DYNAMIC
GRID = HeadGrid(layers=3, query_heads=8, kv_heads=4, head_dim=64)
SHAPE = (GRID.layers, GRID.kv_heads)
CONDITIONS = Conditions(
    fingerprint=fingerprint(GRID),
    recipe="measured",
    strategies=(Strategy(S, pool=1), Strategy(D, index="mean", chunk=64)),
    keep=KeepRule(2, 4, 8),
    kappas=KAPPAS,
    ratios=RATIOS,
    replies="given",
    dtype="bfloat16",
    versions=(("hkvprof", "0"),),
)
RECIPE = Recipe(budget=0.3)
EVEN = np.arange(GRID.total).reshape(SHAPE) % 2 == 0
TYPES = np.where(EVEN, S, D).astype(np.uint8)


def make_statistics(
    seed: int = 0, compared: Sequence[int] = (1, 1, 1), grid: HeadGrid = GRID
) -> SampleStatistics:
    """What heads attend to, at random."""
    random = np.random.RandomState(seed)
    heads = (grid.layers, grid.query_heads)
    mass = random.rand(len(CLASSES), *heads)
    there = np.array(compared, dtype=np.uint8)
    drift = random.rand(len(PAIRS), *heads) * there[:, None, None]
    return SampleStatistics(
        modality_mass=(mass / mass.sum(axis=0)).astype(np.float32),
        entropy=random.rand(*heads).astype(np.float32),
        drift=drift.astype(np.float32),
        compared=there,
    )


def make_row(
    number: int,
    task: str,
    types: NDArray[np.uint8],
    noise: float = 0.0,
    vision: int = 7,
    seed: int = 0,
) -> SampleRow:
    """A sample that loses a third with the strategy of the wanted type, and is as sparse as it."""
    random = np.random.RandomState(1000 * seed + number)
    level = np.linspace(1.0, 1.3, GRID.total).reshape(SHAPE)
    factor = np.stack([np.where(types == S, 1.0, 9.0), np.where(types == D, 1.0, 9.0)])
    spread = np.exp(noise * random.randn(3, 2, *SHAPE, 1))
    losses = (level * factor)[None, ..., None] * spread * (1 - np.array(RATIOS)) ** 16
    sparsity = np.where(types == S, 0.97, 0.8).repeat(GRID.group, axis=1)
    sparsity = np.clip(sparsity + 0.1 * noise * random.randn(len(KAPPAS), *sparsity.shape), 0, 1)
    return SampleRow(
        id=f"s{number:03}",
        task=task,
        tokens=2000 + number,
        sparsity=np.broadcast_to(sparsity, (len(KAPPAS), *sparsity.shape[-2:])).astype(np.float32),
        losses=losses.astype(np.float32),
        statistics=make_statistics(number),
        vision_tokens=vision,
    )


def make_rows(counts: dict[str, int], noise: float = 0.0, seed: int = 0) -> list[SampleRow]:
    """Samples of several tasks that all want TYPES, but for noise."""
    tasks = [task for task, count in counts.items() for _ in range(count)]
    return [make_row(i, task, TYPES, noise, seed=seed) for i, task in enumerate(tasks)]


def evidence_of(rows: Sequence[SampleRow], recipe: RecipeName = "measured") -> Evidence:
    return Evidence.of(replace(CONDITIONS, recipe=recipe), rows, replace(RECIPE, name=recipe))


def assess(rows: Sequence[SampleRow], recipe: RecipeName = "measured") -> Confidence:
    evidence = evidence_of(rows, recipe)
    return confidence.assess(evidence, evidence.judge(evidence.everything))


def values(found: Comparison) -> dict[str, float]:
    return {name: interval.value for name, interval in found.figures.items()}
