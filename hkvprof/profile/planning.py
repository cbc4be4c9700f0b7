"""Planning: from curves, a budget and a prompt length to the strategy and share of every head.

What the strategies of a menu cost and whether they fit is in `costs`, how a budget is dealt out in
`budgets`. Works on arrays, and knows no profile (record.Profile.allocation asks it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import BudgetError
from hkvprof.heads import HeadType, Rules, Strategy
from hkvprof.profile.budgets import ANY, INFEASIBLE, NEAR, Allocation
from hkvprof.profile.costs import (
    BURST,
    FRESH,
    DynamicLayout,
    Menu,
    fetched_share,
    fresh_items,
    most_read_bytes,
)
from hkvprof.profile.dealing import allocate, losses_of, scale_ratios

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
    fetch: float | None = None,
) -> Allocation:
    """Strategy, ratio and reads of every head from curves [S, L, Hkv, R]. Raises BudgetError.

    `margin` [L, Hkv, R] is by how much the best static strategy must lose less than the best
    dynamic one to be chosen (calibration.decide). `fetch` is the most that a step reads from the
    host, as a share of the dense bytes (infinite: no limit; None: the knee, dealing.allocate).

    Nothing was measured below the first ratio, so no head gets less than that (or than an even
    share, where the whole budget is smaller): on prompts far longer than the calibrated ones the
    floor in tokens would else promise the loss of many more tokens.
    """
    extra = _Extra(menu, ratios, margin)
    floor = max(menu.floor, min(float(ratios[0]), share))
    if floor < ratios[0]:
        ratios = np.concatenate([[np.float32(floor)], ratios])
        loss = np.concatenate([loss[..., :1], loss], axis=-1)
    least = ratios.astype(np.float64) * (1 - NEAR)
    fits = np.array([[menu.fits(s, float(ratio)) for ratio in least] for s in menu.strategies])
    possible = np.where(fits[:, None, None, :], loss, INFEASIBLE)
    chosen = allocate(possible, ratios, share, floor, rules.even, extra, fetch)
    return with_limits(menu, chosen, fetch)


@dataclass(frozen=True)
class _Extra:
    """What strategies cost at a ratio beside their loss (dealing.Extra)."""

    menu: Menu
    known: NDArray[np.float32]
    curves: NDArray[np.float32] | None

    def margin(self, ratio: NDArray[np.float64]) -> NDArray[np.float64]:
        """[..., heads, strategies] for ratios [..., heads]: of static strategies alone."""
        static = [strategy.head_type is HeadType.STATIC for strategy in self.menu.strategies]
        cost = np.zeros((*ratio.shape, len(static)))
        if self.curves is not None:
            curves = self.curves.reshape(ratio.shape[-1], -1).astype(np.float64)
            at, known = np.log(ratio), np.log(self.known.astype(np.float64))
            own = [np.interp(at[..., h], known, curve) for h, curve in enumerate(curves)]
            cost[..., static] = np.stack(own, axis=-1)[..., None]
        return cost

    def reads(self, ratio: NDArray[np.float64]) -> NDArray[np.float64]:
        """[..., strategies]: what a limited plan has to have room for."""
        found, places = np.unique(ratio, return_inverse=True)
        each = [
            [fetched_share(self.menu, strategy, r).limit for strategy in self.menu.strategies]
            for r in found.tolist()
        ]
        return np.array(each)[places.reshape(ratio.shape)]


def with_limits(menu: Menu, chosen: Allocation, fetch: float | None) -> Allocation:
    """How many items may become hot per step and head, within a mean of `fetch` of dense bytes.

    FRESH of the hot ones; more of them, alike for all heads, where `fetch` leaves room. None: BURST
    of them; infinite: no limit. Raises BudgetError where not even that much may be read.
    """
    if fetch == math.inf:
        return chosen
    layouts = _readers(menu, chosen)
    limits = np.full(chosen.ratio.size, ANY)
    part = BURST if fetch is None else _part(menu, layouts, fetch * menu.dense_bytes * limits.size)
    for head, (_, layout) in layouts.items():
        limits[head] = fresh_items(layout, part)
    return replace(chosen, fresh=limits.reshape(chosen.ratio.shape))


def _readers(menu: Menu, chosen: Allocation) -> dict[int, tuple[Strategy, DynamicLayout]]:
    """By number, the heads that read from the host."""
    found = {}
    pairs = zip(chosen.strategy.flat, chosen.ratio.flat, strict=True)
    for head, (number, ratio) in enumerate(pairs):
        strategy = menu.strategies[number]
        layout = menu.reading(strategy, float(ratio))
        if layout is not None:
            found[head] = strategy, layout
    return found


def _part(menu: Menu, layouts: dict[int, tuple[Strategy, DynamicLayout]], room: float) -> float:
    """The largest part of the hot items that may be new where all heads read `room` bytes."""
    sizes = (menu.host_bytes, menu.host_bytes)

    def taken(part: float) -> float:
        return sum(
            most_read_bytes(strategy.rerank, layout.chunk, *sizes, fresh_items(layout, part))
            for strategy, layout in layouts.values()
        )

    room *= 1 + 1e-12
    low, high = FRESH if taken(FRESH) <= room else 0.0, 1.0
    if taken(high) <= room:
        return high
    if taken(low) > room:
        raise BudgetError(
            f"a step may read {room:.0f} bytes of a prompt of {menu.tokens} tokens, and its "
            f"dynamic heads read at least {taken(low):.0f}: raise fetch"
        )
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) <= room else (low, middle)
    return low


def plan_scaled(
    menu: Menu,
    strategy: NDArray[np.uint8],
    base: NDArray[np.float32],
    loss: NDArray[np.float32],
    ratios: NDArray[np.float32],
    share: float,
    fetch: float | None = None,
) -> Allocation:
    """Strategies as they are, ratios in proportion to `base`, both [L, Hkv]. Raises BudgetError.

    The curves [S, L, Hkv, R] decide nothing here: they say what to expect. Without them nothing
    is known of reads either: where no `fetch` is given, there is no limit.
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
    plan = Allocation(strategy, ratio, float(expected.sum()), expected)
    return with_limits(menu, plan, math.inf if fetch is None else fetch)


def poorest_loss(strategies: tuple[Strategy, ...], loss: NDArray[np.float32]) -> float | None:
    """Summed loss of all heads at the least measured share under their best static strategy.

    A measure to read other losses by: no plan loses more from that share on, at any prompt length.
    Where the menu has no static strategy the best of all counts; None where nothing was measured.
    """
    static = np.array([strategy.head_type is HeadType.STATIC for strategy in strategies])
    least = loss[static if static.any() else slice(None), ..., 0].min(axis=0).astype(np.float64)
    return float(least.sum()) if bool((least < INFEASIBLE).all()) else None
