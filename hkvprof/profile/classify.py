"""From merged statistics to types and budgets: the `paper` and the `measured` recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import UsageError
from hkvprof.heads import HeadGrid, HeadType, KeepRule, Strategy
from hkvprof.policy.budget import INFEASIBLE, Allocation, scale_ratios


def paper_menu(chunk: int, text_prior: float) -> tuple[Strategy, Strategy]:
    """HybridKV: text-prior pruning; chunks of tokens behind their mean key. Raises UsageError."""
    if not 1 <= chunk <= 4096:
        raise UsageError(f"chunk is {chunk}: expected 1 to 4096 tokens (HybridKV: 16 to 64)")
    if not 0 <= text_prior <= 1:
        raise UsageError(f"text_prior is {text_prior}: expected a share in [0, 1]")
    return (
        Strategy(HeadType.STATIC, pool=1, text_prior=float(text_prior)),
        Strategy(HeadType.DYNAMIC, index="mean", chunk=chunk),
    )


PAPER_MENU = paper_menu(chunk=16, text_prior=0.5)
PAPER_CONSTANTS = {"theta": 0.9, "kappa": 0.10, "coefficient": 1.0, "chunk": 16, "text_prior": 0.5}
"""Defaults of the recipe's options."""


def refuse_paper_constants(recipe: str, given: Mapping[str, float]) -> None:
    """Raise UsageError where constants of `paper` are given to another recipe."""
    changed = [name for name, value in given.items() if value != PAPER_CONSTANTS[name]]
    if recipe != "paper" and changed:
        raise UsageError(
            f"{', '.join(changed)} belong to recipe 'paper', and the recipe is {recipe!r}: leave "
            "them out, or choose paper"
        )


RERANK = 64
"""Candidates beyond the hot buffer: more of them no longer help (docs/retrieval.md)."""

MEASURED_MENU = (
    Strategy(HeadType.STATIC, pool=1),
    Strategy(HeadType.STATIC, pool=7),
    Strategy(HeadType.STATIC, pool=31),
    Strategy(HeadType.DYNAMIC, index="projected", bits=16, rerank=RERANK),
    Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=RERANK),
    Strategy(HeadType.DYNAMIC, index="projected", bits=64, rerank=RERANK),
)
"""Static scores at three pooling widths, and the projected index at three sizes."""

MEASURED_KEEP = KeepRule(sinks=2, recent=4, window=16)
"""Fewer forced tokens than in the literature: scores and indexes find the useful ones themselves
(docs/experiments.md)."""

REPLY_WEIGHT, OUTPUT_WEIGHT, POWER = 1.0, 0.5, 0.5
"""Weights of the two terms (the reply knows what the answer depends on), and the root taken."""

REFERENCE_RATIO = 0.05
"""Where the two loss terms are brought to one scale."""

Z95 = 1.96


@dataclass(frozen=True)
class Curves:
    """Means over samples, [strategies, layers, kv_heads, ratios] (see statistics.LayerLosses)."""

    output: NDArray[np.float64]
    square: NDArray[np.float64]
    reply: NDArray[np.float64]


def loss_scales(curves: Curves, ratios: NDArray[np.float32]) -> tuple[float, float]:
    """Means over all heads of `square` and `reply` at the menu's first strategy (static) near
    REFERENCE_RATIO."""
    at = int(np.abs(ratios - REFERENCE_RATIO).argmin())
    return float(curves.square[0, :, :, at].mean()), float(curves.reply[0, :, :, at].mean())


def planning_loss(
    curves: Curves, ratios: NDArray[np.float32], scales: tuple[float, float] | None = None
) -> NDArray[np.float32]:
    """What planning minimises: root mean squares of the reply's and of the output's change.

    Each mean square is divided by its `scales` (default: `loss_scales` of these curves), whatever
    the model's scale. The root, because the errors of many heads pull a margin the same way and so
    add up by size, not by square (docs/experiments.md).
    """
    square, reply = loss_scales(curves, ratios) if scales is None else scales
    terms = ((curves.square, square, OUTPUT_WEIGHT), (curves.reply, reply, REPLY_WEIGHT))
    total = np.zeros_like(curves.square)
    for term, scale, weight in terms:
        total += weight * (term / max(scale, 1e-30)) ** POWER
    total = np.where(curves.output >= INFEASIBLE, float(INFEASIBLE), total)
    return np.minimum(total, float(INFEASIBLE)).astype(np.float32)


def classify_by_sparsity(
    mean: NDArray[np.float32], std: NDArray[np.float32], samples: int, theta: float, grid: HeadGrid
) -> NDArray[np.uint8]:
    """Types [layers, kv_heads] by HybridKV's rule: static when sparsity reaches `theta`.

    `mean`, `std` [layers, query_heads] over samples. Conservative twice: a group is static only if
    all of its query heads are, and a head whose 95% interval reaches below theta is dynamic (a
    wrong static loses data for good, a wrong dynamic costs milliseconds). One sample is no proof.
    """
    error = std / np.sqrt(samples - 1) if samples > 1 else np.full_like(std, np.inf)
    return types_by_sparsity(mean - Z95 * error, theta, grid)


def types_by_sparsity(
    sparsity: NDArray[np.float32], theta: float, grid: HeadGrid
) -> NDArray[np.uint8]:
    """Types [layers, kv_heads]: static where all query heads of the group reach `theta`."""
    static = (sparsity >= theta).reshape(grid.layers, grid.kv_heads, grid.group).all(axis=-1)
    return np.where(static, HeadType.STATIC, HeadType.DYNAMIC).astype(np.uint8)


def allocate_by_sparsity(
    types: NDArray[np.uint8], mean: NDArray[np.float32], share: float, floor: float, grid: HeadGrid,
    coefficient: float = 1.0,
) -> Allocation:  # fmt: skip
    """HybridKV's top-down budgets: first to the types, then static heads in proportion to their
    (group mean) sparsity, dynamic heads evenly.

    `coefficient` (r, which is not public) is the mean share of static heads over that of dynamic
    ones. No head keeps less than `floor` or more than everything; what that costs or frees is
    taken from or given to the others in proportion.
    """
    score = mean.reshape(grid.layers, grid.kv_heads, grid.group).mean(axis=-1).astype(np.float64)
    static = types == HeadType.STATIC
    weight = float(np.where(static, coefficient, 1.0).mean())
    ratio = np.full(types.shape, share / weight)
    if static.any():
        ratio[static] *= coefficient * score[static] / max(float(score[static].mean()), 1e-12)
    ratio = scale_ratios(np.maximum(ratio, 1e-6).astype(np.float32), share, floor)
    return Allocation(types.copy(), ratio, float("nan"))
