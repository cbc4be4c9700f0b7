"""Options of how what was measured becomes types and budgets, for `calibrate` and `merge`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

if TYPE_CHECKING:
    from hkvprof.policy.planning import Rules
    from hkvprof.profile.risk import Risk


class RiskKind(StrEnum):
    """What of many samples counts."""

    MEAN = "mean"
    CVAR = "cvar"


Budget = Annotated[
    str, typer.Option("--budget", help="Default share of dense K/V bytes to keep, all-in.")
]
Theta = Annotated[
    float, typer.Option("--theta", help="Sparsity from which a head is static (paper).")
]
Kappa = Annotated[
    float, typer.Option("--kappa", help="Share of keys whose attention is sparsity (paper).")
]
Coefficient = Annotated[
    float,
    typer.Option("--coefficient", help="Static heads' mean share over dynamic ones' (paper)."),
]
Even = Annotated[
    float | None,
    typer.Option("--even", help="Part of every budget dealt evenly, 0 to 1 (measured)."),
]
RiskOption = Annotated[
    RiskKind | None,
    typer.Option("--risk", help="Plan for the mean of all samples, or of the worst (measured)."),
]
Level = Annotated[
    float | None, typer.Option("--risk-level", help="With cvar: 0.9 is the worst tenth.")
]
Conservative = Annotated[
    bool | None,
    typer.Option(
        "--conservative/--no-conservative", help="Types in doubt become dynamic (measured)."
    ),
]
TransferWeight = Annotated[
    float | None,
    typer.Option("--transfer-weight", help="Loss per share fetched and step (measured)."),
]


class Planning(TypedDict):
    """Arguments of profile.evidence.Decision."""

    rules: Rules
    risk: Risk
    conservative: bool


def planning(
    even: float | None,
    risk: RiskKind | None,
    level: float | None,
    conservative: bool | None,
    transfer_weight: float | None,
) -> Planning:
    """What the options say, with defaults for those that were not given. Raises UsageError."""
    from hkvprof.errors import UsageError
    from hkvprof.policy.planning import DEFAULT, Rules
    from hkvprof.profile.evidence import CONSERVATIVE, MEAN
    from hkvprof.profile.risk import Risk

    if level is not None and risk is not RiskKind.CVAR:
        raise UsageError("--risk-level belongs to --risk cvar: give both, or neither")
    return {
        "rules": Rules(
            DEFAULT.even if even is None else even,
            DEFAULT.transfer_weight if transfer_weight is None else transfer_weight,
        ),
        "risk": Risk(risk or MEAN.kind, MEAN.level if level is None else level),
        "conservative": CONSERVATIVE if conservative is None else conservative,
    }
