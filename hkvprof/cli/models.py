"""`hkvprof models`: the names that --model takes, and the architectures that are tested."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

EXAMPLES = """\b
Examples:
  hkvprof models
  hkvprof models --json"""


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the short names of models, and the architectures that are tested (docs/models.md)."""
    from hkvprof.models import coverage
    from hkvprof.models.sources import ALIASES

    aliases = [ALIASES[name] for name in sorted(ALIASES)]
    if as_json:
        names = [{"name": a.name, "hub_id": a.hub_id or None, "note": a.note} for a in aliases]
        tested = [asdict(row) for row in coverage.COVERAGE.values()]
        typer.echo(json.dumps({"aliases": names, "architectures": tested}, indent=2))
        return
    typer.echo(_columns([(alias.name, alias.hub_id or alias.note) for alias in aliases]))
    typer.echo(
        "\n--model also takes a hub id (owner/name), a folder made by save_pretrained or a GGUF "
        "file."
    )
    typer.echo(
        "\nTested architectures; others are tried as they are, some refused with the reason:\n"
    )
    typer.echo(_columns([coverage.HEADERS, *coverage.rows()]))


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """The rows as lines of text, columns aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
