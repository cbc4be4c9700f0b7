"""`--data`: loaded, and what is said of it before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hkvprof.cli import options
from hkvprof.errors import SampleError, counted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hkvprof.samples.read import LoadedSamples, OnError, Reading, Sample

Format = Annotated[
    str | None,
    typer.Option("--data-format", help="The layout of --data, where its looks do not tell."),
]
ImageFolder = Annotated[
    Path | None,
    typer.Option("--image-folder", help="Where the pictures of --data are, if not beside it."),
]
Question = Annotated[
    str | None,
    typer.Option("--question", help="Asked of every picture or text that has no question."),
]
_MOST_REASONS = 20


def reading(layout: str | None, image_folder: Path | None, question: str | None) -> Reading:
    """The three options as a record. Raises UsageError for what cannot be."""
    from hkvprof.samples.read import Reading

    made = Reading(layout, image_folder, question)
    made.check()
    return made


def load(data: str, limit: int | None, seed: int, on_error: OnError, how: Reading) -> LoadedSamples:
    """The samples of `--data`, and on stderr what they were recognised as."""
    from hkvprof.cli.output import say
    from hkvprof.samples.read import load_samples

    options.announce_source(data)
    loaded = load_samples(data, max_samples=limit, seed=seed, on_error=on_error, reading=how)
    for line in loaded.recognised.lines():
        say(line)
    samples, tasks = counted(len(loaded.samples), "sample"), counted(len(loaded.tasks), "task")
    say(f"{samples} of {tasks} from {data}")
    for reason in loaded.skipped[:_MOST_REASONS]:
        say(f"skipped: {reason}")
    if len(loaded.skipped) > _MOST_REASONS:
        say(f"skipped: {len(loaded.skipped) - _MOST_REASONS} more")
    return loaded


def check(samples: LoadedSamples, model: str, on_error: OnError) -> None:
    """Say what the samples hold, and what is odd about it for this model.

    Raises SampleError where the model takes text alone and samples have pictures, or the other way
    round (unless such samples are skipped); ModelError.
    """
    from hkvprof.cli.output import say
    from hkvprof.models.load import takes_pictures
    from hkvprof.samples.survey import Survey

    survey, sighted = Survey.of(samples.samples), takes_pictures(model)
    for line in survey.lines():
        say(line)
    for doubt in survey.doubts(sighted):
        say(f"note:  {doubt}")
    unfit = survey.contexts if sighted else survey.seen
    if unfit and on_error == "raise":
        why = (
            'text marked "modality": "context", and the model {} takes pictures'
            if sighted
            else "pictures, and the model {} takes text alone"
        ).format(model)
        raise SampleError(
            f"{unfit} of {len(samples.samples)} samples have {why}: use another model or data set, "
            "or --on-error skip"
        )


def try_encoding(processor: Any, samples: Iterable[Sample]) -> None:
    """Encode the first sample of every kind of content, such as pictures or videos.

    Raises SampleError, or what else the processor refuses it with, before weights are loaded.
    """
    from hkvprof.samples.read import open_images

    kinds: dict[frozenset[str], Sample] = {}
    for sample in samples:
        parts = (m["content"] for m in sample.messages if not isinstance(m["content"], str))
        kinds.setdefault(frozenset(part["type"] for own in parts for part in own), sample)
    for sample in kinds.values():
        try:
            processor.encode([open_images(sample)])
        except SampleError as error:
            named = str(error).startswith(f"sample {sample.id!r}")
            raise SampleError(f"{'' if named else f'sample {sample.id!r}: '}{error}") from None
