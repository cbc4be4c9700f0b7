"""The command line: the app with its global options, and its verbs, each beside its options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import hkvprof
from hkvprof.cli import (
    bench,
    calibrate,
    certify,
    demo,
    doctor,
    evaluate,
    exchange,
    hub,
    merge,
    models,
    plan,
    profiles,
    report,
    reproduce,
    serve,
)
from hkvprof.cli.demo import run_command
from hkvprof.cli.grouped import GroupedCommand

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="hkvprof",
    help="Profile the attention heads of a model once; compress its KV cache ever after.",
    epilog="\b\nStart here:\n  hkvprof demo",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hkvprof {hkvprof.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (at any place).")
    ] = False,
) -> None:
    """See `help` above; `run` takes `--debug` out before typer parses the rest."""


app.command("demo", epilog=demo.EXAMPLES)(demo.demo)
app.command("calibrate", cls=GroupedCommand, epilog=calibrate.EXAMPLES)(calibrate.calibrate)
app.command("merge", cls=GroupedCommand, epilog=merge.EXAMPLES)(merge.merge)
app.command("inspect", epilog=profiles.INSPECT_EXAMPLES)(profiles.inspect)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("report", epilog=report.EXAMPLES)(report.report)
app.command("diff", epilog=profiles.DIFF_EXAMPLES)(profiles.diff)
app.command("validate", epilog=profiles.VALIDATE_EXAMPLES)(profiles.validate)
app.command("push", epilog=hub.PUSH_EXAMPLES)(hub.push)
app.command("pull", epilog=hub.PULL_EXAMPLES)(hub.pull)
app.command("export", epilog=exchange.EXPORT_EXAMPLES)(exchange.export)
app.command("import", epilog=exchange.IMPORT_EXAMPLES)(exchange.import_)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("models", epilog=models.EXAMPLES)(models.models)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("reproduce", epilog=reproduce.EXAMPLES)(reproduce.reproduce)
app.command("certify", epilog=certify.EXAMPLES)(certify.certify)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)


def run(arguments: Sequence[str]) -> int:
    """Run one command line in this process and return its exit code; never raises HkvError."""
    return run_command(typer.main.get_command(app), arguments)


def main() -> None:
    """Run the command line of this process, as the entry point `hkvprof`, and exit."""
    sys.exit(run(sys.argv[1:]))
