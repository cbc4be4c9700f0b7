"""Options that several verbs take, and what they all do with them."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from hkvprof.errors import UsageError

if TYPE_CHECKING:
    from hkvprof.calibration.risk import Risk
    from hkvprof.profile.planning import Rules
    from hkvprof.profile.record import Profile

Model = Annotated[str, typer.Option("--model", help="Alias (`hkvprof models`), hub id or folder.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: CUDA if present.")
]

Budgets = Annotated[
    str, typer.Option("--budget", help="Shares, tokens or bytes, separated by commas.")
]


def listed(text: str) -> list[str]:
    """What a comma-separated option lists; blanks and empty parts do not count."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_shard(text: str) -> tuple[int, int]:
    """Part and number of parts from `I/N`. Raises UsageError."""
    part, slash, parts = text.partition("/")
    if slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts):
        return int(part), int(parts)
    raise UsageError(f"--shard {text}: expected I/N with 1 <= I <= N, such as 1/2")


def announce_source(data: str) -> None:
    """Say so where samples are not here, and are asked of the hub."""
    from hkvprof.cli.output import say
    from hkvprof.samples.read import on_hub

    if (found := on_hub(data)) is not None:
        say(f"no such folder or file here: asking the hub for the dataset {found.name}")


def open_empty(name: str, profile: Profile) -> tuple[Any, Any]:
    """The model without weights and its processor. Raises ProfileError for another one's profile.

    With them all is checked that does not need weights, before `open_model`.
    """
    from hkvprof.cli.output import quiet_transformers
    from hkvprof.runtime.handle import without_weights

    quiet_transformers()
    return without_weights(name, profile)


def open_model(
    name: str,
    dtype: str,
    device: str | None,
    device_map: str | None = None,
    fsdp: int | None = None,
) -> tuple[Any, Any]:
    """Load model and processor, saying so, without transformers' own chatter."""
    from hkvprof.cli.output import quiet_transformers, say
    from hkvprof.models import load_model

    quiet_transformers()
    say(f"loading {name}")
    return load_model(name, dtype=dtype, device=device, device_map=device_map, fsdp=fsdp)


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
    """Arguments of calibration.evidence.Decision."""

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
    from hkvprof.calibration.evidence import CONSERVATIVE, MEAN
    from hkvprof.calibration.risk import Risk
    from hkvprof.errors import UsageError
    from hkvprof.profile.planning import DEFAULT, Rules

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
