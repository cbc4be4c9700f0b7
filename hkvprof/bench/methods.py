"""What is compared: transformers' own caches, and a profile at several budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from hkvprof.bench.records import Row
from hkvprof.errors import BudgetError, ProfileError, UsageError
from hkvprof.heads import HeadGrid, HeadType
from hkvprof.profile.budgets import INFEASIBLE, Budget
from hkvprof.profile.record import Profile


class Kind(StrEnum):
    """A way to hold the KV cache; the value is how tables call it."""

    DENSE = "dense"
    PREALLOCATED = "dense, preallocated"
    WHOLE = "whole"
    STATIC = "static only"
    DYNAMIC = "dynamic only"
    PROFILE = "profile"

    @property
    def compresses(self) -> bool:
        """Whether hkvprof holds the cache."""
        return self not in (Kind.DENSE, Kind.PREALLOCATED)


COMPRESSING = {"static": Kind.STATIC, "dynamic": Kind.DYNAMIC, "profile": Kind.PROFILE}
"""Names on the command line."""
WHOLE = "0.9999"
"""A budget that keeps all but a few tokens: hkvprof's kernel on what is nearly a dense cache."""
_TYPES = {Kind.STATIC: HeadType.STATIC, Kind.DYNAMIC: HeadType.DYNAMIC}


@dataclass(frozen=True)
class Method:
    """One row of the comparison; `profile` and `budget` (as the user wrote it) where it compresses.

    The budget is one of hkvprof.profile.budgets.Budget: a share, tokens per head, or bytes.
    `graph`: steps are recorded and replayed. `control`: host items lie on the device instead, so
    that nothing crosses the host link. `fetch` is what a step may read (budgets.Fetch).
    """

    kind: Kind
    budget: str = ""
    profile: Profile | None = field(default=None, compare=False)
    graph: bool = False
    prefetch: bool = False
    control: bool = False
    fetch: str | None = None

    @property
    def name(self) -> str:
        """Unique within a comparison."""
        marks = {"graph": self.graph, "prefetch": self.prefetch}
        parts = [str(self.kind), self.budget, *(mark for mark, is_set in marks.items() if is_set)]
        parts += ["items on the device"] if self.control else []
        return ", ".join(part for part in parts if part)

    def row(self, reason: str = "") -> Row:
        """Its row before it has figures; `reason` says why there will be none."""
        kind = self.kind.name.lower()
        return Row(self.name, kind, self.budget, reason, self.graph, self.control)


def methods(
    profiles: Mapping[Kind, Profile],
    budgets: Sequence[str],
    preallocated: bool = True,
    fetch: str | None = None,
) -> list[Method]:
    """Rows for prompts that are read: the dense caches, then every budget under every profile.

    Raises BudgetError for budgets that are no compression or named twice.
    """
    check_budgets(budgets)
    stock = [Method(Kind.DENSE), *([Method(Kind.PREALLOCATED)] if preallocated else [])]
    return stock + [
        Method(kind, b, profile, fetch=fetch) for b in budgets for kind, profile in profiles.items()
    ]


def filled_methods(
    budgets: Sequence[str], profiles: Mapping[Kind, Profile] | None = None
) -> list[Method]:
    """Rows for filled caches. What is measured at one budget only is at the middle one."""
    kinds, host_kinds = tuple(COMPRESSING.values()), (Kind.DYNAMIC, Kind.PROFILE)
    made, middle = profiles or {}, budgets[len(budgets) // 2]
    static = made.get(Kind.STATIC)
    return [
        Method(Kind.DENSE),
        Method(Kind.PREALLOCATED),
        Method(Kind.PREALLOCATED, graph=True),
        Method(Kind.WHOLE, WHOLE, static, graph=True),
        *(Method(kind, b, made.get(kind), graph=True) for b in budgets for kind in kinds),
        *(Method(kind, middle, made.get(kind)) for kind in kinds),
        *(Method(kind, middle, made.get(kind), prefetch=True) for kind in host_kinds),
        *(Method(kind, middle, made.get(kind), graph=True, control=True) for kind in host_kinds),
    ]


def uniform_types(grid: HeadGrid) -> dict[Kind, Any]:
    """Types for calibration.uniform where nothing was calibrated: PROFILE is every other KV head
    dynamic."""
    turns = (np.arange(grid.total) % 2).reshape(grid.layers, grid.kv_heads)
    return {Kind.STATIC: "static", Kind.DYNAMIC: "dynamic", Kind.PROFILE: turns}


def check_budgets(budgets: Sequence[str]) -> None:
    """Raise BudgetError unless every budget can be read, is below 1 and named once."""
    if not budgets:
        raise UsageError("no budget: expected budgets such as 0.20,0.10,0.05")
    for text in budgets:
        if Budget.parse(text).share == 1:
            raise BudgetError(
                f"budget {text} compresses nothing, and the dense rows show that already: expected "
                "shares below 1 such as 0.10, tokens such as 4096 or bytes such as 2GiB"
            )
    if len({Budget.parse(text) for text in budgets}) < len(budgets):
        raise BudgetError(f"budgets {','.join(budgets)} name a budget twice: name each once")


def check_names(wanted: Sequence[str]) -> None:
    """Raise UsageError for a name that is not among COMPRESSING."""
    unknown = [name for name in wanted if name not in COMPRESSING]
    if unknown:
        raise UsageError(f"unknown method {unknown[0]!r}: expected {', '.join(COMPRESSING)}")


def variants(profile: Profile, wanted: Sequence[str] = ()) -> dict[Kind, Profile]:
    """The profile as planned, and planned with one type of strategies alone.

    `wanted` holds names of COMPRESSING; without it, all that the profile can do. Raises UsageError
    or ProfileError for a wanted one that it cannot do.
    """
    check_names(wanted)
    able = [name for name, kind in COMPRESSING.items() if _can(profile, kind)]
    chosen = [name for name in COMPRESSING if name in (wanted or able)]
    return {
        COMPRESSING[name]: only(profile, _TYPES[COMPRESSING[name]])
        if COMPRESSING[name] in _TYPES
        else profile
        for name in chosen
    }


def _can(profile: Profile, kind: Kind) -> bool:
    if kind not in _TYPES:
        return True
    has = any(strategy.head_type is _TYPES[kind] for strategy in profile.strategies)
    return profile.recipe == "measured" and has


def only(profile: Profile, head_type: HeadType) -> Profile:
    """The profile planned with strategies of one type: all others are marked as infeasible.

    Raises UsageError where types are fixed, ProfileError where the menu has none of the type.
    """
    name = head_type.name.lower()
    if profile.recipe != "measured":
        raise UsageError(
            f"the types of a {profile.recipe} profile are fixed, it cannot be planned with {name} "
            "heads only: leave that method out, or calibrate with --recipe measured"
        )
    allowed = np.array([strategy.head_type is head_type for strategy in profile.strategies])
    if not allowed.any():
        menu = ", ".join(strategy.name for strategy in profile.strategies)
        raise ProfileError(
            f"the profile has no {name} strategy (its menu: {menu}), so it cannot be planned with "
            f"{name} heads only: leave that method out, or calibrate again"
        )
    mask = allowed[:, None, None, None]
    near = int(np.abs(profile.ratios - profile.default_budget).argmin())
    usual = profile.loss_at(profile.usual_tokens)
    best = np.where(mask, usual, np.inf)[..., near].argmin(axis=0)
    return dataclasses.replace(
        profile,
        strategy=best.astype(np.uint8),
        loss=np.where(mask, profile.loss, INFEASIBLE).astype(np.float32),
    )


def reason_not(method: Method, tokens: int, itemsize: int, rows: int) -> str:
    """Why a compressing method cannot hold a prompt of so many tokens; empty if it can.

    `itemsize` is bytes per K/V element, `rows` the batch.
    """
    if method.profile is None:
        return ""
    try:
        plan = method.profile.allocation(method.budget, tokens, itemsize, rows, method.fetch)
    except BudgetError as error:
        return str(error)
    if bool((plan.ratio >= 1).all()):
        return f"budget {method.budget} holds a prompt of {tokens} tokens whole"
    return ""
