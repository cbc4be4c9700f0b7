"""`hkvprof calibrate --dry-run`: what it would take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from hkvprof.cli import options
from hkvprof.errors import ModelError

if TYPE_CHECKING:
    from hkvprof.calibration.estimate import Lengths, Timing
    from hkvprof.cli.runs import Place
    from hkvprof.samples.read import Sample


def foretell(
    model: str,
    load: dict[str, Any],
    samples: Sequence[Sample],
    place: Place,
    how: dict[str, Any],
    as_json: bool,
) -> None:
    """Print what measuring `samples` takes; `load` are the options of `open_model`."""
    from hkvprof.calibration import estimate
    from hkvprof.cli.output import quiet_transformers
    from hkvprof.cli.progress import track
    from hkvprof.models.load import load_empty
    from hkvprof.models.outline import outline
    from hkvprof.report.forecast import DryRun

    quiet_transformers()
    empty, processor = load_empty(model)
    sizes = outline(empty, load["dtype"])
    encoding = track(samples, "encoding samples", len(samples))
    found = estimate.lengths(processor, encoding, how["on_error"])
    timing, untimed = _timing(model, load, estimate.middle(found, samples), how)
    measured, _ = place.measured(samples)
    dry = DryRun(
        samples=len(samples),
        unusable=found.unusable,
        measured=measured,
        tokens=list(found.tokens.values()),
        memory=estimate.memory(sizes, max(found.tokens.values())),
        timing=timing,
        seconds=_seconds(timing, found, samples, place, how["recipe"]) if timing else None,
        untimed=untimed,
    )
    if as_json:
        typer.echo(json.dumps(dry.to_json(), indent=2))
        return
    for line in dry.lines():
        typer.echo(line)


def _timing(
    model: str, load: dict[str, Any], sample: Sample, how: dict[str, Any]
) -> tuple[Timing | None, str]:
    """One sample's times, or why the model cannot be loaded."""
    from hkvprof.calibration.calibrate import prepare_bench
    from hkvprof.calibration.estimate import time_one

    try:
        loaded, processor = options.open_model(model, **load)
    except ModelError as error:
        return None, str(error)
    constants = {name: how[name] for name in ("kappa", "chunk", "text_prior")}
    bench = prepare_bench(loaded, processor, how["recipe"], how["replies"], **constants)
    return time_one(bench, sample), ""


def _seconds(
    timing: Timing, found: Lengths, samples: Sequence[Sample], place: Place, recipe: str
) -> float:
    """Time for the samples of this shard that have no row yet, and for the index."""
    from hkvprof.calibration import estimate

    left = sum(found.tokens.get(sample.id, 0) for sample in place.left(samples))
    fits = recipe == "measured" and not place.has_index
    return estimate.seconds(timing, estimate.fitted_tokens(found, samples) if fits else 0, left)
