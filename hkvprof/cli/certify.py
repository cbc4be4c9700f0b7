"""`hkvprof certify`: the least budget that provably loses little, written into the profile."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hkvprof.cli import options
from hkvprof.errors import UsageError, counted

if TYPE_CHECKING:
    from hkvprof.evaluate.certify import Claim
    from hkvprof.evaluate.contest import ProfiledModel
    from hkvprof.evaluate.records import TaskSet
    from hkvprof.profile.certificate import Certificate
    from hkvprof.profile.record import Profile

EXAMPLES = """\b
Examples:
  hkvprof certify mine.safetensors --model tinyvl --tasks tinyvl --per-task 10
  hkvprof certify mine.safetensors --model ./vlm --data heldout --alpha 0.05 -o out.safetensors
  hkvprof certify mine.safetensors --model ./vlm --tasks docvqa:/data/docvqa --max-samples 400
  hkvprof certify mine.safetensors --model ./vlm --data prompts --loss agreement --dry-run
Exit code: 0 a budget is certified, 3 none is (the profile then says why), 2 too few samples or
samples of the calibration (nothing is run), 1 a failure."""

NOT_CERTIFIED = 3


def certify(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile of this model.")],
    model: options.Model,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Held-out samples: folder, .jsonl file or dataset id."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="In place of --data: tinyvl, longtext or LAYOUT:PATH."),
    ] = None,
    alpha: Annotated[
        float, typer.Option("--alpha", help="Share of samples that may degrade.")
    ] = 0.02,
    delta: Annotated[
        float, typer.Option("--delta", help="Chance that the certificate is wrong.")
    ] = 0.05,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Shares to test, the largest first; chosen beforehand.")
    ] = "0.5,0.3,0.2,0.15,0.1,0.07,0.05",
    fetch: options.Fetch = None,
    loss: Annotated[
        str, typer.Option("--loss", help="answers (against the replies) or agreement (no replies).")
    ] = "answers",
    regimes: Annotated[
        str | None,
        typer.Option(
            "--regimes", help="Some of inside, after, later; default: inside, and later if any."
        ),
    ] = None,
    per_task: Annotated[
        int, typer.Option("--per-task", min=1, help="Samples of each task (generated tasks).")
    ] = 10,
    tokens: Annotated[
        str, typer.Option("--tokens", help="Prompt length of longtext samples, or a range of it.")
    ] = "2500",
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", min=1, help="Samples of --data or a layout.")
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", help="Folder of answers, kept; else OUTPUT.answers until done."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Certified profile; default: in place.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be tested; load no model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
) -> None:  # fmt: skip
    """Find the least budget at which, with confidence, at most alpha of all samples degrade.

    The held-out samples are answered with the full cache and at every budget. A run that was
    stopped goes on where it was.
    """
    from hkvprof.cli.output import check_folder, check_output, say
    from hkvprof.evaluate.certify import Claim, parse_budgets
    from hkvprof.evaluate.contest import ProfiledModel
    from hkvprof.evaluate.journal import forget
    from hkvprof.evaluate.tasks import default_tasks
    from hkvprof.profile.record import load_profile

    claim = Claim(alpha, delta, parse_budgets(budgets), loss, _regimes(regimes), fetch)
    loaded = load_profile(profile)
    path = output or profile
    check_output(path, force or output is None)
    if data is not None and tasks is not None:
        raise UsageError("--data and --tasks exclude each other: give one of them")
    source = data or tasks or default_tasks(model)

    folder = answers or path.with_name(f"{path.name}.answers")
    check_folder(folder)
    empty, processor = options.open_empty(model, loaded)
    known = _samples(data, source, claim, processor, per_task, tokens, max_samples)
    claim = _checked(loaded, source, known, claim, regimes is not None)
    if dry_run:
        _announce(known, claim)
        return
    _check_answers(empty, processor, loaded, known, claim, folder)
    network, processor = options.open_model(model, dtype, device)
    say(f"{counted(len(known.samples), 'sample')} of {source}; at most "
        f"{claim.most_losses(len(known.samples))} may degrade")  # fmt: skip
    certificate = _certified(ProfiledModel(network, processor, loaded), known, claim, folder)
    _write(loaded, certificate, path)
    if answers is None:  # they have served their purpose
        forget(folder)
    _print(certificate, path, as_json)
    if certificate.certified is None:
        raise typer.Exit(NOT_CERTIFIED)


def _regimes(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(options.listed(text or "inside,later")))


def _samples(
    data: str | None,
    source: str,
    claim: Claim,
    processor: Any,
    per_task: int,
    tokens: str,
    max_samples: int | None,
) -> TaskSet:
    """Samples whose answers the claim's loss can judge. Raises UsageError, SampleError."""
    from hkvprof.cli.output import say
    from hkvprof.evaluate.certify import judged
    from hkvprof.evaluate.tasks import load_tasks, whole_folder

    if data is not None:
        options.announce_source(source)
    whole = (
        load_tasks(source, processor, per_task, tokens, max_samples)
        if data is None
        else whole_folder(source, max_samples)
    )
    kept = judged(whole, claim)
    without = len(whole.samples) - len(kept.samples)
    if without:
        say(f"left out: {counted(without, 'sample')} with nothing that {claim.loss} in "
            f"{', '.join(claim.regimes)} could be judged by")  # fmt: skip
    return kept


def _checked(profile: Profile, source: str, tasks: TaskSet, claim: Claim, given: bool) -> Claim:
    """The claim, as far as the samples have questions for it. Raises UsageError."""
    from hkvprof.evaluate.certify import check_source, fitting

    claim.check_samples(len(tasks.samples), f"samples of {source}")
    check_source(profile, source, tasks.samples)
    return fitting(claim, tasks, given)


def _announce(tasks: TaskSet, claim: Claim) -> None:
    from hkvprof.report.certainty import claim_text

    count = len(tasks.samples)
    typer.echo(f"Would test: {claim_text(claim.alpha, claim.delta, claim.loss)}.")
    typer.echo(
        f"{counted(count, 'sample')} of {tasks.name} (at least {claim.needed} needed): a budget "
        f"is accepted with at most {claim.most_losses(count)} degraded."
    )
    typer.echo(
        f"Budgets, in this order, until one fails: {', '.join(f'{b:g}' for b in claim.budgets)}."
    )


def _check_answers(
    empty: Any, processor: Any, profile: Profile, tasks: TaskSet, claim: Claim, folder: Path
) -> None:
    """Raise UsageError for samples of the calibration, and for answers of other conditions."""
    from hkvprof.cli.output import say
    from hkvprof.cli.progress import track
    from hkvprof.evaluate.certify import check_contents, conditions
    from hkvprof.evaluate.journal import check_conditions

    if not check_contents(profile, processor, tasks.samples, track):
        say("the profile does not record which samples it was calibrated on: only whole sets could "
            "be compared")  # fmt: skip
    known = conditions(empty, profile, tasks, claim)
    check_conditions(folder, {k: known[k] for k in known if k not in ("model", "dtype")})


def _certified(profiled: ProfiledModel, tasks: TaskSet, claim: Claim, folder: Path) -> Certificate:
    from hkvprof.cli.progress import track
    from hkvprof.evaluate.certify import certify, conditions
    from hkvprof.evaluate.journal import Journal

    journal = Journal(folder, conditions(profiled.model, profiled.profile, tasks, claim))
    with journal.kept():
        return certify(profiled, tasks, claim, journal, track)


def _write(profile: Profile, certificate: Certificate, path: Path) -> None:
    from hkvprof.profile.certificate import KEY

    provenance = {**profile.provenance, KEY: certificate.to_json()}
    dataclasses.replace(profile, provenance=provenance).save(path)


def _print(certificate: Certificate, path: Path, as_json: bool) -> None:
    from hkvprof.report.certainty import page

    if as_json:
        typer.echo(json.dumps(certificate.to_json(), indent=2, sort_keys=True))
        return
    for line in page(certificate):
        typer.echo(line)
    typer.echo(f"Written into {path}; `hkvprof inspect {path}` shows it.")
