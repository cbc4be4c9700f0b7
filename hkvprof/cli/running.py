"""Runs a command line in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hkvprof.cli.errors import guarded


def run_command(command: Any, arguments: Sequence[str]) -> int:
    """Run these arguments of `command` (all verbs) and return the exit code; no HkvError leaves."""
    rest = [argument for argument in arguments if argument != "--debug"]

    def invoke() -> None:
        with command.make_context("hkvprof", rest) as context:
            command.invoke(context)

    return guarded(invoke, debug=len(rest) < len(arguments))
