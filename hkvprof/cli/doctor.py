"""`hkvprof doctor`: does it compute the right thing on this model and this machine?"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from hkvprof.cli import options
from hkvprof.cli.errors import FAILURE
from hkvprof.cli.profiles import OTHER_CONFIG, OTHER_MODEL

EXAMPLES = """\b
Examples:
  hkvprof doctor tinyvl profiles/tinyvl.hkv.safetensors
  hkvprof doctor Qwen/Qwen2.5-VL-7B-Instruct --dtype bfloat16 --json > report.json
  hkvprof doctor ./finetune --only text,masked-text
Exit code: 0 all checks passed, 1 one failed, 3 the profile is of another model, 4 of the same
geometry but other config or weights. Checks: docs/doctor.md."""


def doctor(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Alias, hub id, folder or GGUF file.")
    ],
    profile: Annotated[
        Path | None, typer.Argument(metavar="[PROFILE]", help="A profile to check with it.")
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    device_map: Annotated[
        str | None, typer.Option("--device-map", help="Spread the model, for example `auto`.")
    ] = None,
    only: Annotated[
        str, typer.Option("--only", help="Checks by name, separated by commas; default: all.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove on your own model and machine that compression computes what it should."""
    from hkvprof.doctor.examine import choose, examine
    from hkvprof.profile.record import load_profile
    from hkvprof.report.doctor import text

    names = options.listed(only)
    count = len(choose(names))
    loaded = None if profile is None else load_profile(profile)
    network, processor = options.open_model(model, dtype, device, device_map)
    report = examine(network, processor, loaded, names, lambda checks: _shown(checks, count))
    name = Path(model).name if Path(model).exists() else model  # folders are nobody's business
    page = {"model": name, **report.to_json()}
    typer.echo(json.dumps(page, indent=2, sort_keys=True) if as_json else text(report, name))
    if code := _exit_code(report):
        raise typer.Exit(code)


def _shown(checks: Iterable[Any], count: int) -> Iterable[Any]:
    """The checks one by one, each named on stderr as it begins."""
    from hkvprof.cli.progress import track

    return track(checks, "examining", count)


def _exit_code(report: Any) -> int:
    if report.failures:
        return FAILURE
    if report.profile is None:
        return 0
    if report.profile.mismatches:
        return OTHER_MODEL
    return OTHER_CONFIG if report.profile.notes else 0
