"""`hkvprof report`: a profile as one HTML page for a colleague."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hkvprof.cli import options

EXAMPLES = """\b
Examples:
  hkvprof report tinyvl.profile.safetensors
  hkvprof report p.safetensors --eval out/ -o report.html"""


def report(
    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="A profile made by `hkvprof calibrate`.")
    ],
    evaluation: options.Evaluation = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The page to write.")
    ] = Path("report.html"),
) -> None:  # fmt: skip
    """Write a profile, and how it did, as one HTML page that needs no network."""
    from hkvprof.cli.output import say
    from hkvprof.evaluate.belonging import check_belongs
    from hkvprof.files.atomic import write_atomically
    from hkvprof.profile.record import load_profile
    from hkvprof.report.evaluated import evaluated
    from hkvprof.report.page import page

    loaded = load_profile(profile)
    if evaluation is not None:
        check_belongs(evaluation, profile, loaded)
    section = "" if evaluation is None else evaluated(evaluation)
    text = page(loaded, profile.name, section).encode()
    write_atomically(output, text)
    say(f"{output} ({len(text) / 1e6:.1f} MB): open it in a browser")
