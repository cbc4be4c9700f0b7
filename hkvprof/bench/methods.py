"""What is compared: transformers' own caches, and a profile at several budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from hkvprof.errors import BudgetError, ProfileError, UsageError
from hkvprof.heads import HeadType
from hkvprof.profile.budgets import INFEASIBLE, Budget
from hkvprof.profile.record import Profile


class Kind(StrEnum):
    """A way to hold the KV cache; the value is how tables call it."""

    DENSE = "dense"
    PREALLOCATED = "dense, preallocated"
    STATIC = "static only"
    DYNAMIC = "dynamic only"
    PROFILE = "profile"

    @property
    def compresses(self) -> bool:
        """Whether hkvprof does it."""
        return self not in (Kind.DENSE, Kind.PREALLOCATED)


COMPRESSING = {"static": Kind.STATIC, "dynamic": Kind.DYNAMIC, "profile": Kind.PROFILE}
"""Names on the command line."""
_TYPES = {Kind.STATIC: HeadType.STATIC, Kind.DYNAMIC: HeadType.DYNAMIC}


@dataclass(frozen=True, eq=False)
class Method:
    """One row of the comparison; `profile` and `budget` (as the user wrote it) where it compresses.

    The budget is one of hkvprof.profile.budgets.Budget: a share, tokens per head, or bytes.
    """

    kind: Kind
    budget: str = ""
    profile: Profile | None = None

    @property
    def name(self) -> str:
        """Unique within a comparison."""
        return f"{self.kind}, {self.budget}" if self.budget else str(self.kind)


def methods(
    profiles: Mapping[Kind, Profile], budgets: Sequence[str], preallocated: bool = True
) -> list[Method]:
    """All rows: the dense caches, then every budget under every profile.

    Raises BudgetError for budgets that are no compression or named twice.
    """
    check_budgets(budgets)
    stock = [Method(Kind.DENSE), *([Method(Kind.PREALLOCATED)] if preallocated else [])]
    ours = [Method(kind, budget, p) for budget in budgets for kind, p in profiles.items()]
    return stock + ours


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
    """Why a compressing method cannot hold such a prompt; empty if it can.

    `itemsize` is bytes per K/V element, `rows` the batch.
    """
    if method.profile is None:
        return ""
    try:
        plan = method.profile.allocation(method.budget, tokens, itemsize, rows)
    except BudgetError as error:
        return str(error)
    if bool((plan.ratio >= 1).all()):
        return f"budget {method.budget} holds a prompt of {tokens} tokens whole"
    return ""
