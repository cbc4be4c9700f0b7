"""`hkvprof calibrate --dry-run`: what it would take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from hkvprof.errors import ModelError

if TYPE_CHECKING:
    from hkvprof.calibration.estimate import Lengths, Timing
    from hkvprof.calibration.recipe import Recipe
    from hkvprof.cli.runs import Loading, Place
    from hkvprof.models.outline import Outline
    from hkvprof.samples.read import OnError, Sample


def foretell(
    loading: Loading,
    samples: Sequence[Sample],
    recipe: Recipe,
    place: Place,
    on_error: OnError,
    as_json: bool,
) -> None:
    """Print what measuring `samples` takes."""
    from hkvprof.calibration import estimate
    from hkvprof.cli.output import quiet_transformers
    from hkvprof.cli.progress import track
    from hkvprof.models.load import load_empty
    from hkvprof.models.outline import outline
    from hkvprof.report.forecast import DryRun

    quiet_transformers()
    empty, processor = load_empty(loading.name)
    sizes = outline(empty, loading.dtype)
    encoding = track(samples, "encoding samples", len(samples))
    lengths = estimate.lengths(processor, encoding, on_error)
    timing, untimed = _timing(loading, estimate.middle(lengths, samples), recipe)
    measured, _ = place.measured(samples)
    dry = DryRun(
        samples=len(samples),
        unusable=lengths.unusable,
        measured=measured,
        tokens=list(lengths.tokens.values()),
        memory=estimate.memory(sizes, max(lengths.tokens.values())),
        timing=timing,
        seconds=_seconds(timing, lengths, samples, place, recipe, sizes) if timing else None,
        untimed=untimed,
    )
    if as_json:
        typer.echo(json.dumps(dry.to_json(), indent=2))
        return
    for line in dry.lines():
        typer.echo(line)


def _timing(loading: Loading, sample: Sample, recipe: Recipe) -> tuple[Timing | None, str]:
    """One sample's times, or why the model cannot be loaded."""
    from hkvprof.calibration.estimate import time_one
    from hkvprof.calibration.probe import ProbedModel

    try:
        model, processor = loading.open()
    except ModelError as error:
        return None, str(error)
    return time_one(ProbedModel.of(model, processor, recipe), sample), ""


def _seconds(
    timing: Timing,
    lengths: Lengths,
    samples: Sequence[Sample],
    place: Place,
    recipe: Recipe,
    sizes: Outline,
) -> float:
    """Time for the samples of this shard that have no row yet, and for the index."""
    from hkvprof.calibration import estimate

    left = sum(lengths.tokens.get(sample.id, 0) for sample in place.left(samples))
    if not recipe.index_sizes:
        return estimate.seconds(timing, 0, left, 0)
    fitted = 0 if place.has_index else estimate.fitted_tokens(lengths, samples)
    kept = min(left, estimate.kept_tokens(sizes, fitted))
    return estimate.seconds(timing, fitted, left, left - kept)
