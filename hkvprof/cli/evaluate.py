"""`hkvprof eval`: full cache, hkvprof and baselines on the same samples."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hkvprof.cli import options
from hkvprof.errors import BudgetError, UsageError
from hkvprof.lazy import require_extra

if TYPE_CHECKING:
    from hkvprof.evaluate.compare import Track
    from hkvprof.evaluate.contest import MethodAtBudget
    from hkvprof.evaluate.records import TaskSet
    from hkvprof.evaluate.statistics import Duel, MethodSummary
    from hkvprof.profile.record import Profile

EXAMPLES = """\b
Examples:
  hkvprof eval --model tinyvl --profile tinyvl.profile.safetensors --budget 0.10,0.20
  hkvprof eval --model smollm2 --profile p.safetensors --tokens 2000-8000 --baselines public -o out/
  hkvprof eval --model ./vlm --profile p.safetensors --tasks my-samples --regimes inside --json
  hkvprof eval --model ./vlm --profile p.safetensors --tasks docvqa:/data/docvqa
  hkvprof eval --engine vllm --model smollm2 --profile p.safetensors --budget 0.2 --dtype float32"""

LADDERS = {
    "halves": ("0.5", "0.25", "0.125", "0.0625"),
    "tenths": ("0.20", "0.10", "0.05", "0.03", "0.02"),
}
"""Names for budgets that tables go by."""
_REGIMES_HELP = "inside, after, later (default: all that fit); several, after_steps, later_steps."
_SHARD_HELP = "Part I of N of the samples, as I/N: several processes may fill one folder."


@dataclasses.dataclass(frozen=True)
class EvaluationSummary:
    """What is printed and written; `public` are the baselines that are peers' methods."""

    conditions: dict[str, Any]
    summaries: tuple[MethodSummary, ...]
    duels: tuple[Duel, ...]
    public: set[str]

    def to_json(self) -> str:
        """The text of summary.json."""
        plain = {
            "conditions": self.conditions,
            "summaries": [one.to_json() for one in self.summaries],
            "duels": [one.to_json() for one in self.duels],
        }
        return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def evaluate(
    model: options.Model,
    profile: Annotated[Path, typer.Option("--profile", help="Profile of this model.")],
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="vllm: asked beside hkvprof, which follows its plan."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="tinyvl, longtext, a sample folder or file, or LAYOUT:PATH (docs/tasks.md).",
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", help="As elsewhere; halves and tenths name a ladder.")
    ] = "0.10,0.20",
    fetch: options.Fetch = None,
    baselines: Annotated[
        str, typer.Option("--baselines", help="none, public, all, or names (docs/evaluation.md).")
    ] = "none",
    regimes: Annotated[
        str | None,
        typer.Option("--regimes", help=_REGIMES_HELP),
    ] = None,
    per_task: Annotated[
        int, typer.Option("--per-task", min=1, help="Samples of each task (generated tasks).")
    ] = 6,
    tokens: Annotated[
        str, typer.Option("--tokens", help="Prompt length of longtext samples, or a range of it.")
    ] = "2500",
    max_samples: Annotated[
        int | None,
        typer.Option("--max-samples", min=1, help="Samples of a folder or layout, over all tasks."),
    ] = None,
    max_frames: Annotated[
        int, typer.Option("--max-frames", min=1, help="Frames of a video, evenly spread.")
    ] = 16,
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Forced tokens per question, for KL.")
    ] = 64,
    seed: Annotated[int, typer.Option("--seed", help="For methods that draw.")] = 0,
    shard: Annotated[str, typer.Option("--shard", help=_SHARD_HELP)] = "1/1",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output",
            help="Folder for answers, summary and plot; a run that was stopped goes on from it.",
        ),
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot/--no-plot", help="Draw quality.svg (needs `hkvprof[report]`).")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:  # fmt: skip
    """Compare the full cache with a profile, and with other methods, at several budgets."""
    from hkvprof.cli.asked import asked_engines, check_asked
    from hkvprof.cli.data import try_encoding
    from hkvprof.cli.output import check_folder, say
    from hkvprof.cli.progress import track
    from hkvprof.evaluate.belonging import file_digest, keep_content
    from hkvprof.evaluate.compare import compare
    from hkvprof.evaluate.contest import ComparisonPlan, ProfiledModel
    from hkvprof.evaluate.counting import SERVED_ITEMSIZE
    from hkvprof.evaluate.journal import Journal, check_conditions
    from hkvprof.evaluate.shown import keep_shown
    from hkvprof.evaluate.statistics import duels, summarise
    from hkvprof.evaluate.tasks import default_tasks, load_tasks
    from hkvprof.models.adapter import view_model
    from hkvprof.profile.budgets import Fetch
    from hkvprof.profile.record import load_profile

    part, parts = options.parse_shard(shard)
    if output is not None:
        check_folder(output)
        if plot:
            require_extra("matplotlib", "report")
    # Pages of an engine have the bytes of its dtype.
    itemsize = SERVED_ITEMSIZE if dtype == "float32" and engine is None else None
    comparison = ComparisonPlan(
        _budgets(budget), _baselines(baselines), _regimes(regimes), steps, seed, itemsize,
        engine or "",
    )  # fmt: skip
    loaded = load_profile(profile)
    task_name = tasks or default_tasks(model)
    _, processor = options.open_empty(model, loaded)
    task_set = load_tasks(task_name, processor, per_task, tokens, max_samples, max_frames)
    comparison = comparison.fitting(task_set, given=regimes is not None)
    if engine is not None:
        beside = None if baselines == "none" else baselines
        given = {"--baselines": beside, "--fetch": fetch, "--device": device}
        check_asked(comparison, loaded, processor, given)
    conditions = {
        "profile": file_digest(profile),
        "tasks": task_name,
        "tokens": tokens,
        "max_frames": max_frames,
        **({} if fetch is None else {"fetch": str(Fetch.parse(fetch))}),
        **comparison.conditions(),
    }
    check_conditions(output, conditions)
    try_encoding(processor, task_set.samples)
    _tell_shared(loaded, processor, task_set, track)
    network, processor = options.open_model(model, dtype, device)
    conditions |= {
        "model": view_model(network).fingerprint.weights_digest or model,
        "dtype": str(network.dtype).removeprefix("torch."),
    }
    journal = Journal(output, conditions, "" if parts == 1 else f"-{part}of{parts}")
    own_part = dataclasses.replace(task_set, samples=task_set.samples[part - 1 :: parts])
    refused: dict[MethodAtBudget, str] = {}
    profiled = ProfiledModel(network, processor, loaded, fetch)
    with ExitStack() as stack, journal.kept():
        if engine is not None:
            asked = asked_engines((model, profile), profiled, own_part, comparison)
            profiled = dataclasses.replace(profiled, engines=stack.enter_context(asked))
        compare(profiled, own_part, comparison, journal, track, refused)
    for entry, reason in refused.items():
        say(f"{entry.method} at {entry.budget} has no answer to some prompts: {reason}")
    answers = comparison.select(journal.answers, task_set)
    summary = EvaluationSummary(
        conditions,
        tuple(summarise(answers)),
        tuple(duels(answers, comparison.public)),
        comparison.public,
    )
    if output is not None:
        keep_shown(output, task_set.samples)
        keep_content(output, loaded)
        _write(output, summary, model, plot)
    _print(summary, model, profile, as_json)


def _tell_shared(profile: Profile, processor: Any, tasks: TaskSet, track: Track) -> None:
    """Say which samples the calibration saw: their figures tell nothing of others."""
    from hkvprof.cli.output import say
    from hkvprof.evaluate.certify import calibrated_on, shared_samples

    if shared := shared_samples(profile, processor, tasks.samples, track):
        say(f"note: {calibrated_on(shared, tasks.samples)}: figures of those flatter it")


def _budgets(text: str) -> tuple[str, ...]:
    from hkvprof.profile.budgets import Budget

    parts = [budget for part in options.listed(text) for budget in LADDERS.get(part, (part,))]
    if not parts:
        raise UsageError("--budget is empty: expected budgets such as 0.10,0.20")
    for part in parts:
        Budget.parse(part)
    if len(set(parts)) < len(parts):
        raise BudgetError(f"--budget {text} names a budget twice")
    return tuple(parts)


def _baselines(text: str) -> tuple[str, ...]:
    from hkvprof.evaluate.baselines import baselines

    known = baselines()
    if text == "none":
        return ()
    if text in ("all", "public"):
        return tuple(name for name, one in known.items() if one.public or text == "all")
    return tuple(dict.fromkeys(options.listed(text)))


def _regimes(text: str | None) -> tuple[str, ...]:
    from hkvprof.evaluate.records import USUAL_REGIMES

    return USUAL_REGIMES if text is None else tuple(dict.fromkeys(options.listed(text)))


def _write(folder: Path, summary: EvaluationSummary, model: str, plot: bool) -> None:
    from hkvprof.cli.output import say
    from hkvprof.files.atomic import write_atomically

    write_atomically(folder / "summary.json", summary.to_json().encode())
    if plot:
        write_atomically(folder / "quality.svg", _picture(summary, model).encode())
    say(f"answers, summary.json{' and quality.svg' if plot else ''} in {folder}")


def _picture(summary: EvaluationSummary, model: str) -> str:
    from hkvprof.evaluate.records import FULL
    from hkvprof.report.plot import quality_plot

    return quality_plot(
        summary.summaries,
        summary.public,
        model=model,
        tasks=[summary.conditions["tasks"]],
        questions=sum(one.answers for one in summary.summaries if one.method == FULL),
        dtype=summary.conditions["dtype"],
    )


def _print(summary: EvaluationSummary, model: str, profile: Path, as_json: bool) -> None:
    from hkvprof.cli.output import stdout
    from hkvprof.report.comparison import (
        comparison_table,
        duel_lines,
        engine_lines,
        next_steps,
        task_table,
    )

    if as_json:
        typer.echo(summary.to_json(), nl=False)
        return
    console = stdout()
    console.print(comparison_table(summary.summaries))
    console.print(task_table(summary.summaries))
    lines = [*duel_lines(summary.duels), *engine_lines(summary.summaries)]
    for line in [*lines, *next_steps(model, str(profile))]:
        typer.echo(line)
