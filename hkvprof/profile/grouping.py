"""How an engine's groups of heads are made: which heads, in how many bits, by which strategies.

Heads of a group hold equal pages, and in these tokens of equal bits. Numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import BudgetError
from hkvprof.heads import WINDOW, HeadType, Strategy
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.costs import Menu
from hkvprof.profile.dealing import losses_of
from hkvprof.profile.planning import loss_between, plan_anew

if TYPE_CHECKING:
    from hkvprof.profile.record import Profile


@dataclass(frozen=True, eq=False)
class HeadGroups:
    """`group` and `strategy` of every head [layers, kv_heads], and the summed losses of groups,
    `curves` float32 [lengths, groups, ratios]."""

    group: NDArray[np.int64]
    strategy: NDArray[np.int64]
    curves: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LoneHeads:
    """Heads before they are grouped: curves `loss` [lengths, S, layers, kv_heads, R], infeasible
    where the engine cannot follow a strategy, and the `ratio` [layers, kv_heads] that each would
    get by itself of a prompt of the usual length."""

    profile: Profile
    loss: NDArray[np.float32]
    ratio: NDArray[np.float32]

    @classmethod
    def of(cls, profile: Profile, share: float) -> LoneHeads:
        """Those of a profile under a budget. Raises BudgetError where the engine can follow no
        strategy of its menu."""
        loss, tokens = _static_losses(profile), profile.usual_tokens
        menu = Menu(profile.strategies, profile.keep, profile.grid.head_dim, tokens, 2)
        curves = loss_between(loss, profile.lengths, tokens)
        share = max(share, menu.floor)
        made = plan_anew(menu, curves, profile.ratios, share, profile.rules, None, math.inf)
        return cls(profile, loss, made.ratio)

    def cut(self, size: int) -> HeadGroups:
        """Groups of `size` heads, in the order of their ratios; in each the bits and strategies
        that lose least at the group's mean ratio, the more exact ones of equals."""
        order = np.argsort(-self.ratio.reshape(-1), kind="stable")
        group = np.empty(order.size, dtype=np.int64)
        group[order] = np.arange(order.size) // size
        mean = self.ratio.reshape(-1)[order].reshape(-1, size).mean(axis=1)
        lost = self._losses(mean[group].astype(np.float32))
        strategy = np.empty(order.size, dtype=np.int64)
        for heads in order.reshape(-1, size):
            strategy[heads] = self._choose(lost[:, heads])
        return HeadGroups(group.reshape(self.ratio.shape), strategy.reshape(self.ratio.shape),
                          self._curves(group, strategy))  # fmt: skip

    def _losses(self, ratio: NDArray[np.float32]) -> NDArray[np.float64]:
        """[strategies, heads] at these ratios [heads]; infinite where the engine cannot follow."""
        curves = loss_between(self.loss, self.profile.lengths, self.profile.usual_tokens)
        at = np.clip(ratio, self.profile.ratios[0], 1).reshape(self.ratio.shape)
        none = np.zeros(self.ratio.shape, dtype=np.uint8)
        each = [losses_of(one[None], self.profile.ratios, none, at).reshape(-1) for one in curves]
        return np.nan_to_num(np.array(each), nan=np.inf)

    def _choose(self, lost: NDArray[np.float64]) -> NDArray[np.intp]:
        """Strategies of a group's heads that lose [strategies, heads]."""
        bits = np.array([one.resident_bits for one in self.profile.strategies])
        kinds = sorted(set(bits.tolist()), reverse=True)
        each = [np.where(bits[:, None] == kind, lost, np.inf) for kind in kinds]
        best = int(np.argmin([one.min(axis=0).sum() for one in each]))
        return each[best].argmin(axis=0)

    def _curves(self, group: NDArray[np.int64], strategy: NDArray[np.int64]) -> NDArray[np.float32]:
        chosen = strategy.reshape(1, 1, *self.ratio.shape, 1)
        own = np.take_along_axis(self.loss, chosen, axis=1)[:, 0]
        own = own.reshape(len(own), group.size, -1).astype(np.float64)
        each = [own[:, group == number].sum(axis=1) for number in range(int(group.max()) + 1)]
        return np.stack(each, axis=1).astype(np.float32)


def _is_able(one: Strategy) -> bool:
    return one.head_type is HeadType.STATIC and one.score == WINDOW and not one.text_prior


def _static_losses(profile: Profile) -> NDArray[np.float32]:
    able = [_is_able(one) for one in profile.strategies]
    if not any(able) or profile.recipe == "paper":
        raise BudgetError(
            "an engine with blocks needs measured curves of static strategies scored by the "
            f"window, without a text prior; found the recipe {profile.recipe!r} with "
            f"{', '.join(one.name for one in profile.strategies)}: calibrate with --recipe measured"
        )
    return np.where(np.array(able)[:, None, None, None], profile.loss, INFEASIBLE)
