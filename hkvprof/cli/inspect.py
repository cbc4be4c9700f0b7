"""`hkvprof inspect`: what a profile says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """\b
Examples:
  hkvprof inspect tinyvl.profile.safetensors
  hkvprof inspect tinyvl.profile.safetensors --layer 3
  hkvprof inspect tinyvl.profile.safetensors --json | jq .borderline"""


def inspect(
    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="A profile made by `hkvprof calibrate`.")
    ],
    layer: Annotated[
        int | None, typer.Option("--layer", help="Show one layer, head by head (from 0).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="Draw with ASCII alone.")] = False,
    context: Annotated[
        int, typer.Option("--context", min=1, help="Prompt tokens for the memory figures.")
    ] = 32768,
) -> None:
    """Show a profile: head types, budgets, borderline heads, how sure it is, provenance."""
    from hkvprof.cli.output import draws_ascii, stdout
    from hkvprof.profile.record import load_profile
    from hkvprof.report import summary, terminal

    loaded = load_profile(profile)
    if layer is not None:
        page = summary.summarise_layer(loaded, layer)
    elif as_json:
        page = summary.summarise(loaded, context)
    if as_json:
        typer.echo(json.dumps(page, indent=2, sort_keys=True))
        return
    plain = draws_ascii(ascii_only)
    drawn = (
        terminal.overview(loaded, context, plain)
        if layer is None
        else terminal.layer_page(loaded, layer, plain)
    )
    stdout(plain).print(drawn)
