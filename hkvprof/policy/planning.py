"""From a profile's curves to decisions for one prompt length: what fits, then who gets what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import BudgetError, UsageError
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.policy.budget import (
    INFEASIBLE,
    Allocation,
    allocate,
    losses_of,
    scale_ratios,
    token_floor,
)
from hkvprof.policy.costs import dynamic_layout

EVEN = 0.5
"""Part of the budget that all heads get alike (docs/experiments.md, "Budgets dealt evenly")."""


@dataclass(frozen=True)
class Rules:
    """How curves become budgets: the part `even` of the budget is dealt evenly, the rest by loss.

    Raises UsageError for numbers out of range.
    """

    even: float = EVEN

    def __post_init__(self) -> None:
        if not 0 <= self.even <= 1:
            raise UsageError(f"the part dealt evenly must lie in [0, 1], found {self.even}")


DEFAULT = Rules()


@dataclass(frozen=True)
class Menu:
    """Strategies for prompts of `tokens` tokens with `itemsize` bytes per K/V element."""

    strategies: tuple[Strategy, ...]
    keep: KeepRule
    head_dim: int
    tokens: int
    itemsize: int

    @property
    def floor(self) -> float:
        """The least ratio of any head."""
        return token_floor(self.keep.floor_tokens, self.tokens)

    def fits(self, strategy: Strategy, ratio: float) -> bool:
        """Whether the strategy's fixed bytes leave room for tokens at `ratio`."""
        if strategy.head_type is HeadType.STATIC:
            return True
        layout = dynamic_layout(
            strategy, ratio, self.tokens, self.keep, self.head_dim, self.itemsize
        )
        return layout is not None


def plan_anew(
    menu: Menu,
    loss: NDArray[np.float32],
    ratios: NDArray[np.float32],
    share: float,
    rules: Rules = DEFAULT,
) -> Allocation:
    """Strategy and ratio of every head from curves [S, L, Hkv, R]. Raises BudgetError.

    Nothing was measured below the first ratio, so no head gets less than that (or than an even
    share, where the whole budget is smaller): on prompts far longer than the calibrated ones the
    floor in tokens would else promise the loss of many more tokens.
    """
    floor = max(menu.floor, min(float(ratios[0]), share))
    if floor < ratios[0]:
        ratios = np.concatenate([[np.float32(floor)], ratios])
        loss = np.concatenate([loss[..., :1], loss], axis=-1)
    fits = np.array([[menu.fits(s, float(ratio)) for ratio in ratios] for s in menu.strategies])
    possible = np.where(fits[:, None, None, :], loss, INFEASIBLE)
    return allocate(possible, ratios, share, floor, rules.even)


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
