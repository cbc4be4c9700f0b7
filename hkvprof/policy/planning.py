"""From a profile's curves to decisions for one prompt length: what fits, then who gets what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import BudgetError, UsageError
from hkvprof.heads import HeadType, Strategy
from hkvprof.policy.budget import (
    INFEASIBLE,
    NEAR,
    Allocation,
    allocate,
    losses_of,
    scale_ratios,
)
from hkvprof.policy.menu import Menu
from hkvprof.policy.transfer import fetched_share

__all__ = ["Menu", "Rules", "plan_anew", "plan_scaled", "poorest_loss"]

EVEN = 0.75
"""Part of the budget that all heads get alike (docs/experiments.md, "Budgets dealt evenly")."""


@dataclass(frozen=True)
class Rules:
    """How curves become budgets and types.

    The part `even` of the budget is dealt evenly, the rest by loss. At its ratio a head then takes
    the strategy of the least loss, to which is added `transfer_weight` times the share of its dense
    bytes that it reads from the host per step (transfer.fetched_share). Raises UsageError for
    numbers out of range.
    """

    even: float = EVEN
    transfer_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.even <= 1:
            raise UsageError(f"the part dealt evenly must lie in [0, 1], found {self.even}")
        if not 0 <= self.transfer_weight <= 1e9:
            raise UsageError(
                f"the weight of transfers must lie in [0, 1e9], found {self.transfer_weight}"
            )


DEFAULT = Rules()


def plan_anew(
    menu: Menu,
    loss: NDArray[np.float32],
    ratios: NDArray[np.float32],
    share: float,
    rules: Rules = DEFAULT,
    margin: NDArray[np.float32] | None = None,
) -> Allocation:
    """Strategy and ratio of every head from curves [S, L, Hkv, R]. Raises BudgetError.

    `margin` [L, Hkv, R] is by how much the best static strategy must lose less than the best
    dynamic one to be chosen (profile.margin).

    Nothing was measured below the first ratio, so no head gets less than that (or than an even
    share, where the whole budget is smaller): on prompts far longer than the calibrated ones the
    floor in tokens would else promise the loss of many more tokens.
    """
    extra = _Extra(menu, rules, ratios, margin)
    floor = max(menu.floor, min(float(ratios[0]), share))
    if floor < ratios[0]:
        ratios = np.concatenate([[np.float32(floor)], ratios])
        loss = np.concatenate([loss[..., :1], loss], axis=-1)
    least = ratios.astype(np.float64) * (1 - NEAR)
    fits = np.array([[menu.fits(s, float(ratio)) for ratio in least] for s in menu.strategies])
    possible = np.where(fits[:, None, None, :], loss, INFEASIBLE)
    return allocate(possible, ratios, share, floor, rules.even, extra if extra.matters else None)


@dataclass(frozen=True)
class _Extra:
    """What strategies cost at a ratio beside their loss (budget.Extra)."""

    menu: Menu
    rules: Rules
    known: NDArray[np.float32]
    margin: NDArray[np.float32] | None

    @property
    def matters(self) -> bool:
        """Whether it is anything but 0."""
        return self.margin is not None or self.rules.transfer_weight > 0

    def __call__(self, ratio: NDArray[np.float64]) -> NDArray[np.float64]:
        strategies = self.menu.strategies
        cost = np.zeros((len(ratio), len(strategies)))
        if self.margin is not None:
            static = [strategy.head_type is HeadType.STATIC for strategy in strategies]
            curves = self.margin.reshape(len(ratio), -1).astype(np.float64)
            at, known = np.log(ratio), np.log(self.known.astype(np.float64))
            own = [np.interp(x, known, curve) for x, curve in zip(at, curves, strict=True)]
            cost[:, static] = np.array(own)[:, None]
        if self.rules.transfer_weight:
            fetched = [
                [fetched_share(self.menu, strategy, float(r)) for strategy in strategies]
                for r in ratio
            ]
            cost += self.rules.transfer_weight * np.array(fetched)
        return cost


def plan_scaled(
    menu: Menu,
    strategy: NDArray[np.uint8],
    base: NDArray[np.float32],
    loss: NDArray[np.float32],
    ratios: NDArray[np.float32],
    share: float,
) -> Allocation:
    """Strategies as they are, ratios in proportion to `base`, both [L, Hkv]. Raises BudgetError.

    The curves [S, L, Hkv, R] decide nothing here: they say what to expect.
    """
    ratio = scale_ratios(base, share, menu.floor)
    for choice, kept in zip(strategy.flat, ratio.flat, strict=True):
        chosen = menu.strategies[choice]
        if kept < 1 and not menu.fits(chosen, float(kept)):
            raise BudgetError(
                f"budget {share:.4g} gives a dynamic head {kept:.4g} of a prompt of {menu.tokens} "
                f"tokens, less than its index ({chosen.name}), sinks and recent tokens need: raise "
                "the budget or use a longer prompt"
            )
    expected = losses_of(loss, ratios, strategy, ratio)
    return Allocation(strategy, ratio, float(expected.sum()), expected)


def poorest_loss(strategies: tuple[Strategy, ...], loss: NDArray[np.float32]) -> float | None:
    """Summed loss of all heads at the least measured share under their best static strategy.

    A measure to read other losses by: no plan loses more from that share on, at any prompt length.
    Where the menu has no static strategy the best of all counts; None where nothing was measured.
    """
    static = np.array([strategy.head_type is HeadType.STATIC for strategy in strategies])
    least = loss[static if static.any() else slice(None), ..., 0].min(axis=0).astype(np.float64)
    return float(least.sum()) if bool((least < INFEASIBLE).all()) else None
