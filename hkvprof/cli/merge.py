"""`hkvprof merge`: from folders of rows to a profile, without a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hkvprof.calibration.recipe import Recipe
from hkvprof.cli import options
from hkvprof.cli.calibrate import announce

EXAMPLES = """\b
Examples:
  hkvprof merge rows -o mine.profile.safetensors
  hkvprof merge rows-of-machine-1 rows-of-machine-2 --budget 0.05 -o mine.profile.safetensors"""


def merge(
    rows: Annotated[
        list[Path], typer.Argument(metavar="ROWS...", help="Folders of `hkvprof calibrate --rows`.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Profile.")],
    budget: options.Budget = options.DEFAULT_BUDGET,
    theta: options.Theta = Recipe.theta,
    kappa: options.Kappa = Recipe.kappa,
    coefficient: options.Coefficient = Recipe.coefficient,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Make a profile of what shards have measured. The same rows give the same profile."""
    from hkvprof.calibration.merge import measured_by
    from hkvprof.calibration.merge import merge as merged
    from hkvprof.cli.output import check_output

    share = options.parse_share(budget)
    check_output(output, force)
    recipe = replace(
        measured_by(rows[0]), budget=share, theta=theta, kappa=kappa, coefficient=coefficient,
    )  # fmt: skip
    profile = merged(rows, recipe)
    profile.save(output)
    announce(profile, output)
