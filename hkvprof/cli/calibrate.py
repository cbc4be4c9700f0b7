"""`hkvprof calibrate`: from a model and samples to a profile file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hkvprof.calibration.recipe import Recipe, RecipeName, Replies
from hkvprof.cli import data as source
from hkvprof.cli import options
from hkvprof.cli.runs import Loading, Place, check_kind, kept, processes
from hkvprof.errors import counted

if TYPE_CHECKING:
    from hkvprof.calibration.group import Group
    from hkvprof.profile.record import Profile
    from hkvprof.samples.read import LoadedSamples, OnError

EXAMPLES = """\b
Examples:
  hkvprof calibrate --model tinyvl --data calibration/mini
  hkvprof calibrate --model qwen2.5-vl-7b --data my-samples --dtype bfloat16
  hkvprof calibrate --model ./vlm --data llava.json --image-folder /data/coco
  hkvprof calibrate --model ./finetune --data owner/dataset:validation \\
    --max-samples 128 --on-error skip -o finetune.profile.safetensors
  hkvprof calibrate --model ./vlm --data my-samples --recipe paper --theta 0.85 --chunk 32
  hkvprof calibrate --model ./vlm --data my-samples --dry-run
  hkvprof calibrate --model ./vlm --data my-samples --rows rows --shard 1/4 --device cuda:0
  torchrun --nproc-per-node 4 -m hkvprof calibrate --model ./vlm --data my-samples
  torchrun --nproc-per-node 4 -m hkvprof calibrate --model ./large --data my-samples --fsdp"""

_MOST_REASONS = 20
RECIPE, SEVERAL, EXPERTS = options.RECIPE, "Several devices or machines", options.EXPERTS


def calibrate(
    model: options.Model,
    data: Annotated[
        str, typer.Option("--data", help="Folder, file or dataset id (docs/calibration.md).")
    ],
    data_format: source.Format = None,
    image_folder: source.ImageFolder = None,
    question: source.Question = None,
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", min=1, help="Use a subset balanced over tasks.")
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print samples, tokens, memory and time; write nothing."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Profile; default ./<model>.profile.safetensors."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    name: Annotated[
        RecipeName,
        typer.Option(
            "--recipe", help="Types by sparsity (paper) or by measured loss.",
            rich_help_panel=RECIPE,
        ),
    ] = Recipe.name,
    budget: options.Budget = options.DEFAULT_BUDGET,
    replies: Annotated[
        Replies,
        typer.Option(
            "--replies", help="Judge the given replies, or the model's own.",
            rich_help_panel=RECIPE,
        ),
    ] = Recipe.replies,
    seed: Annotated[
        int,
        typer.Option("--seed", help="Seed of the subset and of sampling.", rich_help_panel=RECIPE),
    ] = 0,
    device_map: Annotated[
        str | None,
        typer.Option(
            "--device-map", help="Spread the model, for example `auto`.", rich_help_panel=SEVERAL
        ),
    ] = None,
    fsdp: Annotated[
        bool,
        typer.Option(
            "--fsdp", help="Spread one model over the processes of torchrun.",
            rich_help_panel=SEVERAL,
        ),
    ] = False,
    shard: Annotated[
        str,
        typer.Option(
            "--shard", help="Measure part I of N into --rows; then `hkvprof merge`.",
            rich_help_panel=SEVERAL,
        ),
    ] = "1/1",
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows", help="Folder of measured samples; default OUTPUT.rows until done.",
            rich_help_panel=SEVERAL,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Go on from measured samples, or drop them.",
            rich_help_panel=EXPERTS,
        ),
    ] = True,
    on_error: Annotated[
        Literal["raise", "skip"],
        typer.Option(
            "--on-error", help="Stop at a bad sample, or skip and count it.",
            rich_help_panel=EXPERTS,
        ),
    ] = "raise",
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print JSON.", rich_help_panel=EXPERTS)
    ] = False,
    theta: options.Theta = Recipe.theta,
    kappa: options.Kappa = Recipe.kappa,
    coefficient: options.Coefficient = Recipe.coefficient,
    chunk: Annotated[
        int,
        typer.Option(
            "--chunk", help="Tokens that dynamic heads fetch at once (paper).",
            rich_help_panel=EXPERTS,
        ),
    ] = Recipe.chunk,
    text_prior: Annotated[
        float,
        typer.Option(
            "--text-prior", help="Share of static heads that text may claim (paper).",
            rich_help_panel=EXPERTS,
        ),
    ] = Recipe.text_prior,
) -> None:  # fmt: skip
    """Observe a model on samples and write its profile. A run that was stopped goes on."""
    from hkvprof.cli.dryrun import foretell
    from hkvprof.cli.output import default_profile_path

    with processes(in_step=fsdp) as group:
        recipe = Recipe(
            name, options.parse_share(budget), replies, theta=theta, kappa=kappa,
            coefficient=coefficient, chunk=chunk, text_prior=text_prior,
            seed=seed,
        )  # fmt: skip
        loading = Loading(model, dtype, device, device_map, fsdp)
        place = Place(output or default_profile_path(model), rows, options.parse_shard(shard))
        check_kind(place, loading, resume=resume, dry_run=dry_run, as_json=as_json)
        if place.is_shard or not dry_run:
            place.check(recipe, force)
        how = source.reading(data_format, image_folder, question)
        samples = source.load(data, max_samples, seed, on_error, how)
        source.check(samples, model, on_error)
        if dry_run:
            foretell(loading, samples.samples, recipe, place, on_error, as_json)
            return
        group.from_leader(lambda: place.prepare(samples.samples, resume))
        _require_tested_seam()
        _check_model(loading, samples, recipe, place, on_error)
        network, processor = loading.open(group.size)
        with kept(place, samples.samples):
            if place.is_shard:
                _measure(network, processor, samples, recipe, place, on_error)
                return
            profile = _calibrated(network, processor, samples, recipe, place, on_error, group)
            if group.leads:
                _finish(profile, model, data, samples, place, force)


def _require_tested_seam() -> None:
    """Calibration hooks models as `apply` does, and asks the same of transformers."""
    from hkvprof.runtime import apply
    from hkvprof.runtime.selfcheck import require_tested_seam

    require_tested_seam(apply)


def _check_model(
    loading: Loading, samples: LoadedSamples, recipe: Recipe, place: Place, on_error: OnError
) -> None:
    """Raise what the model's config, its processor and rows that are there already would raise
    after its weights are loaded."""
    from hkvprof.calibration.rows import check_foreseen
    from hkvprof.cli.output import quiet_transformers
    from hkvprof.models.adapter import view_model
    from hkvprof.models.approval import require_approval
    from hkvprof.models.load import check_placing, load_empty

    quiet_transformers()
    check_placing(loading.dtype, loading.device, loading.device_map)
    empty, processor = load_empty(loading.name)
    view = view_model(empty)
    if not view.fingerprint.quantisation:  # of packed layers an empty model does not tell all
        require_approval(view)
    check_foreseen(place.folder, recipe, loading.dtype, view.fingerprint)
    if on_error == "raise":
        source.try_encoding(processor, samples.samples)


def _finish(
    profile: Profile, model: str, data: str, samples: LoadedSamples, place: Place, force: bool
) -> None:
    """Write the profile, and say what was made."""
    from hkvprof.cli.output import check_output, say

    for name in profile.provenance.get("skipped_ids", [])[:_MOST_REASONS]:
        say(f"skipped while measuring: {name}")
    profile = with_source(profile, data, samples)
    check_output(place.output, force)
    profile.save(place.output)
    place.clear()
    say("")
    announce(profile, place.output, model)


def _calibrated(
    model: Any,
    processor: Any,
    samples: LoadedSamples,
    recipe: Recipe,
    place: Place,
    on_error: OnError,
    group: Group,
) -> Profile:
    from hkvprof.calibration import calibrate as calibration
    from hkvprof.cli.progress import track

    return calibration.calibrate(
        model, processor, samples.samples, recipe, rows=place.folder, on_error=on_error,
        track=track, group=group,
    )  # fmt: skip


def _measure(
    model: Any,
    processor: Any,
    samples: LoadedSamples,
    recipe: Recipe,
    place: Place,
    on_error: OnError,
) -> None:
    from hkvprof.calibration import calibrate as calibration
    from hkvprof.cli.progress import track

    part, parts = place.part
    count = calibration.measure(
        model, processor, samples.samples, place.folder, recipe, shard=place.part,
        on_error=on_error, track=track,
    )  # fmt: skip
    done = counted(count, "sample")
    typer.echo(f"{done} of shard {part} of {parts} measured into {place.folder}")
    typer.echo(f"Next, when all shards are done: hkvprof merge {place.folder} -o PROFILE")


def with_source(profile: Profile, data: str, samples: LoadedSamples) -> Profile:
    """The profile with the data's name, digest and the loader's skipped samples in provenance."""
    later = profile.provenance.get("skipped", 0)
    origin = {
        **profile.provenance,
        "data": data,
        "data_digest": samples.digest,
        "skipped": len(samples.skipped) + (later if isinstance(later, int) else len(later)),
    }
    return dataclasses.replace(profile, provenance=origin)


def announce(profile: Profile, path: Path, model: str = "MODEL") -> None:
    """Say what was made, whether the samples were enough, and what to do with it."""
    from hkvprof.profile.sizes import context_for
    from hkvprof.report.certainty import doubts, verdict
    from hkvprof.report.summary import human, sentence, unserved

    typer.echo(f"{sentence(profile, context_for(profile.provenance, None))}.")
    if doubted := doubts(profile):
        typer.echo(f"{doubted}.")
    if short := unserved(profile):
        typer.echo(f"Note: {short}.")
    typer.echo(f"{verdict(profile)}.")
    typer.echo(f"Profile: {path} ({human(path.stat().st_size)})")
    typer.echo(f"""Next:    hkvprof inspect {path}
         hkvprof doctor {model} {path}
         hkvprof eval --model {model} --profile {path} --tasks HELD_OUT
         hkvprof certify {path} --model {model} --data HELD_OUT
         in Python: hkvprof.runtime.apply(model, "{path}")""")
