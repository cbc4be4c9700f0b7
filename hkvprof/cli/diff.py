"""`hkvprof diff`: what differs between two profiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """\b
Examples:
  hkvprof diff old.safetensors new.safetensors
  hkvprof diff old.safetensors new.safetensors --json | jq .flips
Exit code: 0 the same, 1 different (or a file that cannot be read), 2 not comparable."""

DIFFERENT = 1


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A profile.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one of the same model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show heads whose type or share differs between two profiles."""
    from hkvprof.profile.record import load_profile
    from hkvprof.report.difference import difference, lines

    found = difference(load_profile(first), load_profile(second))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, sort_keys=True))
    else:
        for line in lines(found):
            typer.echo(line)
    if not found.is_same:
        raise typer.Exit(DIFFERENT)
