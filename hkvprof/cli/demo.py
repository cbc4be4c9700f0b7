"""`hkvprof demo`: the way from samples to figures on the embedded model, in any folder."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from hkvprof.cli.errors import guarded
from hkvprof.lazy import install_hint


def run_command(command: Any, arguments: Sequence[str]) -> int:
    """Run these arguments of `command` (all verbs) and return the exit code; no HkvError leaves."""
    rest = [argument for argument in arguments if argument != "--debug"]

    def invoke() -> None:
        with command.make_context("hkvprof", rest) as context:
            command.invoke(context)

    return guarded(invoke, debug=len(rest) < len(arguments))


EXAMPLES = """\b
Examples:
  hkvprof demo
  hkvprof demo --quick -o /tmp/demo
Nothing is downloaded. What is made stays in the folder: samples, a profile, answers and a plot."""

SAMPLES, PROFILE, ANSWERS = "samples", "tinyvl.profile.safetensors", "eval"
_MINE = {SAMPLES, PROFILE, f"{PROFILE}.rows", ANSWERS}
_WHOLE = (7, "112", ("--per-task", "2", "--budget", "0.05,0.10,0.20"))
_QUICK = (1, "8", ("--per-task", "1", "--budget", "0.10", "--steps", "8", "--regimes", "inside"))
"""Calibration samples per task and in all, and how the profile is evaluated."""


def demo(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for what is made; made anew each time.")
    ] = Path("hkvprof-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="With a few of the samples: worse, and faster.")
    ] = False,
) -> None:
    """Make calibration samples, calibrate the embedded model, show its profile, evaluate it."""
    from hkvprof.evaluate.journal import forget

    _check(output)
    per_task, most, how = _QUICK if quick else _WHOLE
    samples, profile, answers = output / SAMPLES, output / PROFILE, output / ANSWERS
    began = time.perf_counter()
    plot = () if find_spec("matplotlib") else ("--no-plot",)
    _make_samples(samples, per_task)
    forget(answers)
    for line in (
        ("calibrate", "--model", "tinyvl", "--data", samples, "-o", profile, "--force",
         "--max-samples", most, "--no-resume"),
        ("inspect", profile),
        ("eval", "--model", "tinyvl", "--profile", profile, *how, "-o", answers, *plot),
    ):  # fmt: skip
        words = [str(word) for word in line]
        typer.echo(f"\n$ hkvprof {shlex.join(words)}")
        sys.stdout.flush()  # before what the command says on stderr
        start = time.perf_counter()
        if code := run_command(context.find_root().command, words):
            raise typer.Exit(code)
        typer.echo(f"({time.perf_counter() - start:.0f} s)")
    if plot:
        typer.echo(f"\nFor a plot, too: {install_hint('report').partition(' (')[0]}")
    typer.echo(f"\nAll in {time.perf_counter() - began:.0f} s; see {output}")


def _check(output: Path) -> None:
    """Raise UsageError for a folder that cannot be written, or holds what the demo did not make."""
    from hkvprof.cli.output import check_folder
    from hkvprof.errors import UsageError

    check_folder(output)
    others = sorted({path.name for path in output.iterdir()} - _MINE) if output.is_dir() else []
    if others:
        raise UsageError(f"{output} holds other things ({others[0]}): give another folder with -o")


def _make_samples(folder: Path, per_task: int) -> None:
    from hkvprof.testbed.calibration_set import write_calibration_set

    start = time.perf_counter()
    count = write_calibration_set(folder, per_task, force=True)
    typer.echo(f"{count} calibration samples in {folder} ({time.perf_counter() - start:.0f} s)")
