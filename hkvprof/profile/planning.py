"""Planning: from curves, a budget and a prompt length to the strategy and share of every head.

What the strategies of a menu cost and whether they fit is in `costs`, how a budget is dealt out in
`budgets`. Works on arrays, and knows no profile (record.Profile.allocation asks it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import BudgetError
from hkvprof.heads import HeadType, Rules, Strategy
from hkvprof.profile.budgets import INFEASIBLE, NEAR, Allocation, allocate, losses_of, scale_ratios
from hkvprof.profile.costs import Menu, fetched_share

__all__ = ["DEFAULT", "Menu", "Rules", "plan_anew", "plan_scaled", "poorest_loss"]

DEFAULT = Rules()


def loss_between(
    loss: NDArray[np.float32], lengths: NDArray[np.int64], tokens: int
) -> NDArray[np.float32]:
    """Curves [...] for prompts of `tokens`, from those at `lengths` [A]; `loss` [A, ...].

    Linear in the logarithm of the length; beyond the first and the last length theirs. A point that
    was measured at one of the two neighbours only has the loss of that one: whether a strategy fits
    a prompt is for its layout to say (planning.Menu.fits).
    """
    after = int(np.searchsorted(lengths, tokens, side="left"))
    if after == len(lengths) or int(lengths[after]) == tokens or after == 0:
        return loss[min(after, len(lengths) - 1)]
    first, last = (math.log(int(lengths[i])) for i in (after - 1, after))
    part = (math.log(tokens) - first) / (last - first)
    low, high = loss[after - 1].astype(np.float64), loss[after].astype(np.float64)
    blend = np.where(high >= INFEASIBLE, low, (1 - part) * low + part * high)
    return np.where(low >= INFEASIBLE, high, blend).astype(np.float32)


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
    dynamic one to be chosen (calibration.decide).

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
    """What strategies cost at a ratio beside their loss (budgets.Extra)."""

    menu: Menu
    rules: Rules
    known: NDArray[np.float32]
    margin: NDArray[np.float32] | None

    @property
    def matters(self) -> bool:
        """Whether any strategy costs anything beside its loss."""
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
