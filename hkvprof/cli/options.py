"""Options that several verbs take, and what they all do with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hkvprof.calibration.recipe import Recipe
from hkvprof.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from hkvprof.profile.record import Profile

Model = Annotated[
    str,
    typer.Option("--model", help="Alias (`hkvprof models`), hub id, folder or GGUF file."),
]
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def full_dtype(text: str | None) -> str | None:
    """`bfloat16` for `bf16`, and so on; any other text as it is."""
    return text if text is None else _SHORT.get(text.lower(), text)


Dtype = Annotated[
    str,
    typer.Option("--dtype", callback=full_dtype, help="auto, float32, bfloat16 (bf16) or float16."),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: CUDA if present.")
]

RECIPE, EXPERTS = "The recipe", "For experts"
"""Headings of options in a verb's help (cli.grouped)."""

Budgets = Annotated[
    str, typer.Option("--budget", help="Shares, tokens or bytes, separated by commas.")
]


Fetch = Annotated[
    str | None,
    typer.Option(
        "--fetch",
        help="Most that a decoding step reads from host memory, per row: a share of dense bytes, "
        "bytes, 0 or unlimited; default: as little as loses no more than 3%.",
    ),
]


Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        help="Prompt tokens of every row; default: 32768, or the model's longest context.",
    ),
]
Evaluation = Annotated[
    Path | None,
    typer.Option("--eval", metavar="DIR", help="A folder that `hkvprof eval -o DIR` wrote."),
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

    if (source := on_hub(data)) is not None:
        say(f"no such folder or file here: asking the hub for the dataset {source.name}")


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
    model, processor = load_model(
        name, dtype=dtype, device=device, device_map=device_map, fsdp=fsdp
    )
    advise(model)
    return model, processor


def advise(model: Any) -> None:
    """Say so where another dtype would be much faster."""
    from hkvprof.cli.output import say
    from hkvprof.models.load import emulates_bfloat16

    if emulates_bfloat16(model):
        say("note: this CPU has no instructions for bfloat16, which is some ten times slower than "
            "float32 here: --dtype float32")  # fmt: skip


Budget = Annotated[
    str,
    typer.Option(
        "--budget",
        help="Default share of dense K/V bytes to keep, all-in.",
        rich_help_panel=RECIPE,
    ),
]
Theta = Annotated[
    float,
    typer.Option(
        "--theta",
        help="Sparsity from which a head is static (paper).",
        rich_help_panel=EXPERTS,
    ),
]
Kappa = Annotated[
    float,
    typer.Option(
        "--kappa",
        help="Share of keys whose attention is sparsity (paper).",
        rich_help_panel=EXPERTS,
    ),
]
Coefficient = Annotated[
    float,
    typer.Option(
        "--coefficient",
        help="Static heads' mean share over dynamic ones' (paper).",
        rich_help_panel=EXPERTS,
    ),
]
DEFAULT_BUDGET = f"{Recipe.budget:.2f}"


def parse_share(text: str) -> float:
    """A profile's default budget. Raises BudgetError for tokens and bytes."""
    from hkvprof.profile.budgets import Budget

    share = Budget.parse(text).share
    if share is None:
        raise BudgetError(
            f"--budget {text} is not a share: a profile's default is a share in (0, 1] such as "
            "0.10 or 10%; tokens and bytes are for hkvprof.runtime.apply"
        )
    return share
