"""`hkvprof merge`: from folders of rows to a profile, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hkvprof.cli import options as planning
from hkvprof.cli.calibrate import announce, parse_share

EXAMPLES = """\b
Examples:
  hkvprof merge rows -o mine.profile.safetensors
  hkvprof merge rows-of-machine-1 rows-of-machine-2 --budget 0.05 -o mine.profile.safetensors
  hkvprof merge rows --risk cvar --risk-level 0.9 -o careful.profile.safetensors"""


def merge(
    rows: Annotated[
        list[Path], typer.Argument(metavar="ROWS...", help="Folders of `hkvprof calibrate --rows`.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Profile.")],
    budget: planning.Budget = "0.10",
    theta: planning.Theta = 0.9,
    kappa: planning.Kappa = 0.10,
    coefficient: planning.Coefficient = 1.0,
    even: planning.Even = None,
    risk: planning.RiskOption = None,
    risk_level: planning.Level = None,
    conservative: planning.Conservative = None,
    transfer_weight: planning.TransferWeight = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Make a profile of what shards have measured. The same rows give the same profile."""
    from hkvprof.calibration.merge import Decision
    from hkvprof.calibration.merge import merge as merged
    from hkvprof.cli.output import check_output

    how = planning.planning(even, risk, risk_level, conservative, transfer_weight)
    decision = Decision(
        theta=theta, budget=parse_share(budget), kappa=kappa, coefficient=coefficient, **how
    )
    check_output(output, force)
    profile = merged(rows, decision)
    profile.save(output)
    announce(profile, output)
