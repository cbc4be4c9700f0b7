"""How two budgets, of bytes and of reads, are dealt out over KV heads by their loss curves.

Numpy only.

The problem: choose a strategy s and a kept share r for every head so that the summed loss is least
while the mean share, all bytes included, stays within one budget, and what a decoding step reads
from host memory within the other. Ratios in the curves are all-in (a dynamic head's index is inside
its ratio), and all heads have equal dense bytes, so bytes are simply the mean of the ratios.

At a price per read a head's curve is the least of loss and priced reads over the menu, made
monotone and convex (lower hull); the steepest segments of all heads together are bought first,
which is the Lagrangian optimum of the convexified problem. At the ratios that come of a price,
heads begin with the strategies that read least and take others where they save most loss per read,
as long as the budget lasts. Of all prices the plan of the least loss counts. Prices come from the
curves alone, so that a larger budget of reads chooses among the same plans and some more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import BudgetError
from hkvprof.profile.budgets import INFEASIBLE, NEAR, Allocation

Array = NDArray[np.float64]

KNEE = 0.03
"""What the default budget of reads may lose more than an unlimited one, as a share of the loss."""
PRICES = 12
"""Prices per read at which ratios are tried, beside none."""


class Extra(Protocol):
    """What strategies cost beside their loss, at ratios of any shape [...]."""

    def margin(self, ratio: Array) -> Array:
        """Loss [..., heads, strategies] added where heads choose, for ratios [..., heads]."""
        ...

    def reads(self, ratio: Array) -> Array:
        """Most bytes read per step over the head's dense ones, [..., strategies]."""
        ...


def allocate(
    loss: NDArray[np.float32],
    ratios: NDArray[np.float32],
    share: float,
    floor: float,
    even: float = 0.0,
    extra: Extra | None = None,
    fetch: float | None = math.inf,
) -> Allocation:
    """Choose strategy and ratio per head within a mean ratio of `share` and mean reads of `fetch`.

    `loss` is [strategies, layers, kv_heads, ratios] (INFEASIBLE where a strategy does not fit),
    `ratios` ascending and ending at 1, `floor` the least ratio any head may get; the part `even` of
    the budget, in [0, 1], is dealt evenly, and only the rest by loss. The margins that `extra`
    knows are added where a head chooses its strategy, not to the losses. Heads are judged at the
    very ratios that they get. `fetch` None is the knee: the least reads that lose no more than KNEE
    of the loss beyond what is lost without a limit, margins counted as loss.

    Raises BudgetError when `share` is below `floor`, or no plan reads as little as `fetch`. Never
    exceeds `share` nor `fetch`; ratios of unlimited plans are monotone in `share`, the loss with
    margins is in `fetch`.
    """
    check_share(share, floor)
    heads = loss.shape[1:3]
    curves = _Curves.of(loss, ratios, extra)
    purse = _Purse(share, floor, max(floor, even * share), ratios)
    choices = _Choices.at(curves, purse, np.zeros(1))
    chosen = choices.best(math.inf)
    if fetch is None or fetch < math.inf:
        assert chosen is not None
        slack = KNEE * float(curves.own(*chosen).sum())
        choices = choices.joined(_Choices.at(curves, purse, choices.prices()))
        chosen = choices.best(fetch, slack)
    if chosen is None:
        raise BudgetError(_too_little(fetch, choices))
    ratio, strategy = chosen
    least = curves.own(ratio, strategy)
    if float(least.max()) >= INFEASIBLE:
        raise BudgetError(
            f"budget {share:.4g} is too small: no strategy of some heads fits their share; raise "
            "the budget or use longer prompts"
        )
    return Allocation(
        strategy=strategy.astype(np.uint8).reshape(heads),
        ratio=ratio.reshape(heads),
        expected_loss=float(least.sum()),
        head_loss=least.reshape(heads),
    )


def _too_little(fetch: float | None, choices: _Choices) -> str:
    least = float(choices.read.min())
    return (
        f"a step may read {fetch:.4g} of the dense bytes from the host, and this profile's heads "
        f"read at least {least:.4g} at this budget: raise fetch, or calibrate with a menu that "
        "has static strategies"
    )


def losses_of(
    loss: NDArray[np.float32],
    ratios: NDArray[np.float32],
    strategy: NDArray[np.uint8],
    ratio: NDArray[np.float32],
) -> Array:
    """Loss of every head under its `strategy` at its `ratio`, all [layers, kv_heads].

    NaN where the strategy was not measured at that ratio, because it did not fit.
    """
    at_ratio = _Curves.of(loss, ratios, None).losses(ratio.reshape(1, -1).astype(np.float64))[0]
    own = np.take_along_axis(at_ratio, strategy.reshape(-1, 1).astype(np.intp), axis=1)
    return np.where(own < INFEASIBLE, own, np.nan).reshape(ratio.shape)


@dataclass(frozen=True, eq=False)
class _Curves:
    """Loss curves `flat` [heads, strategies, ratios], made monotone, at the logarithms `known`."""

    flat: Array
    known: Array
    extra: Extra | None

    @classmethod
    def of(
        cls, loss: NDArray[np.float32], ratios: NDArray[np.float32], extra: Extra | None
    ) -> _Curves:
        strategies, layers, kv_heads, _ = loss.shape
        flat = loss.transpose(1, 2, 0, 3).reshape(layers * kv_heads, strategies, -1)
        monotone = np.minimum.accumulate(flat.astype(np.float64), axis=-1)
        return cls(monotone, np.log(ratios.astype(np.float64)), extra)

    def losses(self, ratio: Array) -> Array:
        """[n, heads, strategies] at ratios [n, heads].

        A point whose left neighbour is infeasible is infeasible too (never promise what may not
        fit), unless the right one is NEAR.
        """
        wanted, known, last = np.log(ratio), self.known, len(self.known) - 1
        right = np.clip(np.searchsorted(known, wanted, side="left"), 0, last)
        left = np.maximum(right - 1, 0)
        exact = (known[right] <= wanted) | (right == 0)
        span = np.where(exact, 1.0, known[right] - known[left])
        part = np.where(exact, 1.0, np.clip((wanted - known[left]) / span, 0, 1))[..., None]
        head = np.arange(len(self.flat))
        low, high = self.flat[head, :, left], self.flat[head, :, right]
        # Where part is 1 the left value must not enter at all: 1e30 + (x - 1e30) is 0, not x.
        blend = np.where(part >= 1, high, low + part * (high - low))
        near = (exact | (known[right] - wanted <= NEAR))[..., None]
        return np.where(low >= INFEASIBLE, np.where(near, high, float(INFEASIBLE)), blend)

    def own(self, ratio: NDArray[np.float32], strategy: NDArray[np.intp]) -> Array:
        """[heads]: the loss of every head under its strategy at its ratio."""
        at_ratio = self.losses(ratio[None].astype(np.float64))[0]
        return at_ratio[np.arange(len(ratio)), strategy]

    def reads(self, ratio: Array) -> Array:
        """[..., strategies]; nothing where nothing is known of them."""
        if self.extra is None:
            return np.zeros((*ratio.shape, self.flat.shape[1]))
        return self.extra.reads(ratio)

    def at_prices(self, grid: Array, prices: Array) -> Array:
        """The least of loss and priced reads, [prices, heads, grid], falling along the grid.

        At an infinite price nothing that reads will do.
        """
        wanted = np.broadcast_to(grid[:, None], (len(grid), len(self.flat)))
        losses = self.losses(wanted).transpose(1, 2, 0)  # [heads, strategies, grid]
        reads = self.reads(grid).T
        still = np.where(reads > 0, float(INFEASIBLE), losses)
        each = [still if price == np.inf else losses + price * reads for price in prices]
        return np.minimum.accumulate(np.stack([one.min(axis=1) for one in each]), axis=-1)


@dataclass(frozen=True, eq=False)
class _Purse:
    """A budget of bytes: a mean ratio of `share`; hulls begin at `floor`, and no head gets less
    than `least`. That of hulls is the same for all `least`, so that a larger one never changes the
    order in which segments are bought."""

    share: float
    floor: float
    least: float
    ratios: NDArray[np.float32]

    def spend(self, curves: _Curves, prices: Array) -> NDArray[np.float32]:
        """Kept ratios [prices, heads]: the steepest hull segments first."""
        heads = len(curves.flat)
        if self.share >= 1:
            return np.ones((len(prices), heads), dtype=np.float32)
        above = self.ratios[self.ratios > self.floor]
        grid = np.concatenate([[self.floor], above]).astype(np.float64)
        best = curves.at_prices(grid, prices)
        return np.stack([round_down(self._buy(grid, one)) for one in best])

    def _buy(self, grid: Array, curve: Array) -> Array:
        """Ratios of heads with these curves [heads, grid]."""
        heads = len(curve)
        vertex = lower_hull(np.broadcast_to(grid, curve.shape), curve)
        number = np.where(vertex, np.arange(len(grid)), -1)
        before = np.maximum.accumulate(number, axis=1)[:, :-1]
        head, place = np.nonzero(vertex[:, 1:])
        begin, end = before[head, place], place + 1
        slope = (curve[head, end] - curve[head, begin]) / (grid[end] - grid[begin])
        width = np.maximum(0.0, grid[end] - np.maximum(grid[begin], self.least))
        order = np.argsort(slope, kind="stable")
        head, to, width = head[order], grid[end[order]], width[order]
        left = (self.share - self.least) * heads - (np.cumsum(width) - width)
        whole = (width > 0) & (left >= width)
        ratio = np.full(heads, self.least)
        np.maximum.at(ratio, head[whole], to[whole])
        partial = ((left > 0) & (left < width)).nonzero()[0][:1]
        ratio[head[partial]] += left[partial]
        return ratio


def lower_hull(x: Array, y: Array) -> NDArray[np.bool_]:
    """Which points [n, points] are vertices of the lower convex hulls of n curves, x rising."""
    rows, last = np.arange(len(y)), y.shape[1] - 1
    vertex = np.zeros(y.shape, dtype=bool)
    at = np.zeros(len(y), dtype=np.intp)
    vertex[:, 0] = True
    while bool((at < last).any()):
        ahead = np.arange(last + 1) > at[:, None]
        width = np.where(ahead, x - x[rows, at][:, None], 1.0)
        slope = np.where(ahead, (y - y[rows, at][:, None]) / width, np.inf)
        step = last - slope[:, ::-1].argmin(axis=1)  # of equals the farthest
        at = np.where(at < last, step, last)
        vertex[rows, at] = True
    return vertex


@dataclass(frozen=True, eq=False)
class _Choices:
    """Plans at several prices: at ratio [n, heads] every head begins with strategy `first`, and
    takes others by and by. All together begin with reads `read` and loss `lost` (margins included),
    [n]; `steps` say what comes then, price by price.
    """

    ratio: NDArray[np.float32]
    first: NDArray[np.intp]
    read: Array
    lost: Array
    steps: tuple[_Steps, ...]

    @classmethod
    def at(cls, curves: _Curves, purse: _Purse, prices: Array) -> _Choices:
        """The plans at ratios that are bought at these prices per read."""
        ratio = purse.spend(curves, prices)
        wide = ratio.astype(np.float64)
        losses = curves.losses(wide)
        judged = losses if curves.extra is None else losses + curves.extra.margin(wide)
        judged = np.where(losses < INFEASIBLE, judged, float(INFEASIBLE))
        reads = curves.reads(wide)
        first = _frugal(reads, judged)
        own = first[..., None]
        read, lost = (np.take_along_axis(x, own, -1)[..., 0].sum(-1) for x in (reads, judged))
        steps = tuple(_Steps.of(*one) for one in zip(reads, judged, first, strict=True))
        return cls(ratio, first, read, lost, steps)

    def prices(self) -> Array:
        """Prices at which heads of the first plan change, spread over them, and an infinite one."""
        save = -self.steps[0].slope
        if not len(save):
            return np.array([np.inf])
        spread = np.quantile(save, np.linspace(0, 1, PRICES - 1))
        return np.append(np.unique(spread), np.inf)

    def joined(self, other: _Choices) -> _Choices:
        """These plans and those."""
        parts = [
            np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("ratio", "first", "read", "lost")
        ]
        return _Choices(parts[0], parts[1], parts[2], parts[3], self.steps + other.steps)

    def best(
        self, fetch: float | None, slack: float = 0.0
    ) -> tuple[NDArray[np.float32], NDArray[np.intp]] | None:
        """Ratio and strategy of every head in the best plan within mean reads of `fetch`, or (None)
        of the plan that reads least and loses at most `slack` more; None where no plan reads as
        little."""
        heads = self.ratio.shape[1]
        paths = [
            (read + np.append(0, steps.reads), lost + np.append(0, steps.gains))
            for read, lost, steps in zip(self.read, self.lost, self.steps, strict=True)
        ]
        limit = math.inf if fetch is None else fetch * heads * (1 + 1e-12)
        most = math.inf if fetch is not None else float(paths[0][1][-1]) + slack
        found = []
        for number, (read, lost) in enumerate(paths):
            fits = (read <= limit) & (lost <= most)
            keys = (read, lost) if fetch is None else (lost, read)
            found += [(keys[0][k], keys[1][k], number, k) for k in fits.nonzero()[0].tolist()]
        if not found:
            return None
        *_, number, count = min(found)
        strategy = self.first[number].copy()
        self.steps[number].take(strategy, count)
        return self.ratio[number], strategy


def _frugal(reads: Array, judged: Array) -> NDArray[np.intp]:
    """[n, heads]: of the strategies that read least and fit, the one that loses least."""
    fits = judged < INFEASIBLE
    least = np.where(fits, reads, np.inf).min(axis=-1, keepdims=True)
    return np.where(fits & (reads <= least), judged, np.inf).argmin(axis=-1)


@dataclass(frozen=True, eq=False)
class _Steps:
    """Changes of strategy, those that save most loss per read first: which `head` takes which
    `strategy`; `reads` and `gains` in all up to each, and the `slope` of each."""

    head: NDArray[np.intp]
    strategy: NDArray[np.intp]
    reads: Array
    gains: Array
    slope: Array

    @classmethod
    def of(cls, reads: Array, judged: Array, first: NDArray[np.intp]) -> _Steps:
        """Along the lower hulls of loss over reads, [heads, strategies]."""
        rows, at, found = np.arange(len(first)), first, []
        while True:
            read = reads - reads[rows, at][:, None]
            gain = judged - judged[rows, at][:, None]
            better = (read > 0) & (gain < 0)
            slope = np.where(better, gain / np.where(better, read, 1.0), np.inf)
            step = slope.argmin(axis=1)
            moves = slope[rows, step] < np.inf
            if not bool(moves.any()):
                break
            own = rows[moves], step[moves]
            found.append((*own, read[own], gain[own], slope[own]))
            at = np.where(moves, step, at)
        if not found:
            none = np.zeros(0)
            return cls(none.astype(np.intp), none.astype(np.intp), none, none, none)
        head, strategy, read, gain, slope = map(np.concatenate, zip(*found, strict=True))
        order = np.argsort(slope, kind="stable")
        read, gain = read[order].cumsum(), gain[order].cumsum()
        return cls(head[order], strategy[order], read, gain, slope[order])

    def take(self, strategy: NDArray[np.intp], count: int) -> None:
        """The first `count` changes."""
        for head, to in zip(self.head[:count], self.strategy[:count], strict=True):
            strategy[head] = to


def scale_ratios(base: NDArray[np.float32], share: float, floor: float) -> NDArray[np.float32]:
    """Ratios in proportion to `base`, clipped to [floor, 1], with a mean of at most `share`.

    Raises BudgetError when `share` is below `floor`.
    """
    check_share(share, floor)
    low, high = 0.0, 1.0 / float(base.min())
    for _ in range(60):
        middle = (low + high) / 2
        if float(np.clip(base.astype(np.float64) * middle, floor, 1).mean()) <= share:
            low = middle
        else:
            high = middle
    return round_down(np.clip(base.astype(np.float64) * (high if share >= 1 else low), floor, 1))


def check_share(share: float, floor: float, taken: float = 0.0) -> float:
    """What is left for heads of a budget of which the part `taken` goes to the tokens' positions.

    Raises BudgetError when that is below `floor`.
    """
    if share - taken < floor:
        positions = f", their positions {taken:.4g}" if taken else ""
        raise BudgetError(
            f"budget {share:.4g} is too small: sinks, recent tokens and the floor alone need "
            f"{floor:.4g} of this prompt{positions}; raise the budget or use longer prompts"
        )
    return share - taken


def round_down(ratio: Array) -> NDArray[np.float32]:
    """float32 that never exceeds the float64 it came from."""
    single = ratio.astype(np.float32)
    above = single.astype(np.float64) > ratio
    single[above] = np.nextafter(single[above], np.float32(0))
    return single
