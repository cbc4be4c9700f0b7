"""The command line: parsing, printing and exit codes; one file per verb."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hkvprof.cli.app import app
from hkvprof.cli.demo import run_command

__all__ = ["app", "main", "run"]


def run(arguments: Sequence[str]) -> int:
    """Run one command line in this process and return its exit code; never raises HkvError."""
    import typer

    return run_command(typer.main.get_command(app), arguments)


def main() -> None:
    """The entry point `hkvprof`."""
    sys.exit(run(sys.argv[1:]))
