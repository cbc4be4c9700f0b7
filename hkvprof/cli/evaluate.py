"""`hkvprof eval`: full cache, hkvprof and baselines on the same samples."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hkvprof.cli import options
from hkvprof.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from hkvprof.evaluate.records import Answer

EXAMPLES = """\b
Examples:
  hkvprof eval --model tinyvl --profile tinyvl.profile.safetensors --budget 0.10,0.20
  hkvprof eval --model smollm2 --profile p.safetensors --tokens 2000-8000 --baselines public -o out/
  hkvprof eval --model ./vlm --profile p.safetensors --tasks my-samples --regimes inside --json
  hkvprof eval --model ./vlm --profile p.safetensors --tasks docvqa:/data/docvqa"""

_SHARD_HELP = "Part I of N of the samples, as I/N: several processes may fill one folder."


def evaluate(
    model: options.Model,
    profile: Annotated[Path, typer.Option("--profile", help="Profile of this model.")],
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="tinyvl, longtext, a sample folder or file, or LAYOUT:PATH (docs/tasks.md).",
        ),
    ] = None,
    budget: options.Budgets = "0.10,0.20",
    baselines: Annotated[
        str, typer.Option("--baselines", help="none, public, all, or names (docs/evaluation.md).")
    ] = "none",
    regimes: Annotated[
        str | None,
        typer.Option("--regimes", help="Some of inside, after, later; default: all that fit."),
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:  # fmt: skip
    """Compare the full cache with a profile, and with other methods, at several budgets."""
    from hkvprof.artifact import load_profile
    from hkvprof.cli.progress import track
    from hkvprof.evaluate.compare import compare
    from hkvprof.evaluate.journal import Journal
    from hkvprof.evaluate.plan import Plan
    from hkvprof.evaluate.tasks import default_tasks, load_tasks

    part, parts = _shard(shard)
    plan = Plan(_budgets(budget), _baselines(baselines), _regimes(regimes), steps, seed)
    loaded = load_profile(profile)
    task_name = tasks or default_tasks(model)
    network, processor = options.open_model(model, dtype, device)
    task_set = load_tasks(task_name, processor, per_task, tokens, max_samples, max_frames)
    plan = plan.fitting(task_set, given=regimes is not None)
    conditions = {
        "model": loaded.fingerprint.to_json()["weights_digest"] or model,
        "dtype": str(network.dtype).removeprefix("torch."),
        "profile": hashlib.sha256(profile.read_bytes()).hexdigest(),
        "tasks": task_name,
        "tokens": tokens,
        "max_frames": max_frames,
        **plan.conditions(),
    }
    journal = Journal(output, conditions, "" if parts == 1 else f"-{part}of{parts}")
    mine = dataclasses.replace(task_set, samples=task_set.samples[part - 1 :: parts])
    compare(network, processor, loaded, mine, plan, journal, track)
    answers = plan.select(journal.answers, task_set)
    heading = f"{model}, {conditions['dtype']}, {task_name}"
    if output is not None:
        _write(output, answers, plan, heading)
    _print(answers, plan, model, profile, as_json)


def _budgets(text: str) -> tuple[str, ...]:
    from hkvprof.policy.budget import Budget

    parts = options.listed(text)
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
    from hkvprof.evaluate.records import REGIMES

    return tuple(REGIMES) if text is None else tuple(dict.fromkeys(options.listed(text)))


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts):
        return int(part), int(parts)
    raise UsageError(f"--shard {text}: expected I/N with 1 <= I <= N, such as 1/2")


def _write(folder: Path, answers: list[Answer], plan: Any, heading: str) -> None:
    from hkvprof.cli.output import say
    from hkvprof.files import write_atomically
    from hkvprof.report.quality_plot import quality_plot

    write_atomically(folder / "summary.json", _summary(answers, plan).encode())
    write_atomically(folder / "quality.svg", quality_plot(answers, plan.public, heading).encode())
    say(f"answers, summary.json and quality.svg in {folder}")


def _summary(answers: list[Answer], plan: Any) -> str:
    from hkvprof.evaluate.statistics import duels, summarise

    found = {
        "conditions": plan.conditions(),
        "summaries": [one.to_json() for one in summarise(answers)],
        "duels": [one.to_json() for one in duels(answers, plan.public)],
    }
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


def _print(answers: list[Answer], plan: Any, model: str, profile: Path, as_json: bool) -> None:
    from rich.console import Console

    from hkvprof.report.comparison import comparison, next_steps

    if as_json:
        typer.echo(_summary(answers, plan), nl=False)
        return
    console = Console()
    for part in comparison(answers, plan.public):
        console.print(part)
    for line in next_steps(model, str(profile)):
        typer.echo(line)
