"""`hkvprof models`: the names that --model takes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

EXAMPLES = """\b
Examples:
  hkvprof models
  hkvprof models --json"""


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the short names of models; hub ids and local folders work as well."""
    from hkvprof.models.aliases import ALIASES

    aliases = [ALIASES[name] for name in sorted(ALIASES)]
    if as_json:
        rows = [{"name": a.name, "hub_id": a.hub_id or None, "note": a.note} for a in aliases]
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(len(alias.name) for alias in aliases)
    for alias in aliases:
        typer.echo(f"{alias.name:<{width}}  {alias.hub_id or alias.note}")
    typer.echo("\n--model also takes a hub id (owner/name) or a folder made by save_pretrained.")
