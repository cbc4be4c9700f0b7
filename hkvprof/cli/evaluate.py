"""`hkvprof eval`: full against compressed cache on the same samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hkvprof.cli import options
from hkvprof.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from hkvprof.evaluate.compare import Answer

EXAMPLES = """\b
Examples:
  hkvprof eval --model tinyvl --profile tinyvl.profile.safetensors --budget 0.10,0.20
  hkvprof eval --model smollm2 --profile p.safetensors --tasks longtext --tokens 4000
  hkvprof eval --model ./vlm --profile p.safetensors --tasks my-samples --json
  hkvprof eval --model ./vlm --profile p.safetensors --tasks docvqa:/data/docvqa"""


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
    per_task: Annotated[
        int, typer.Option("--per-task", min=1, help="Samples of each task (generated tasks).")
    ] = 6,
    tokens: Annotated[
        int, typer.Option("--tokens", min=400, help="Prompt length of longtext samples.")
    ] = 2500,
    max_samples: Annotated[
        int | None,
        typer.Option("--max-samples", min=1, help="Samples of a folder or layout, over all tasks."),
    ] = None,
    max_frames: Annotated[
        int, typer.Option("--max-frames", min=1, help="Frames of a video, evenly spread.")
    ] = 16,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for answers.jsonl and summary.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Compare the full cache with a profile at several budgets."""
    from hkvprof.artifact import load_profile
    from hkvprof.cli.output import say
    from hkvprof.cli.progress import track
    from hkvprof.evaluate.compare import compare
    from hkvprof.evaluate.tasks import default_tasks, load_tasks

    budgets = _budgets(budget)
    loaded = load_profile(profile)
    task_name = tasks or default_tasks(model)
    network, processor = options.open_model(model, dtype, device)
    task_set = load_tasks(task_name, processor, per_task, tokens, max_samples, max_frames)
    answers = compare(network, processor, loaded, task_set, budgets, track)
    if output is not None:
        _write(output, answers)
        say(f"answers and summary in {output}")
    _print(answers, model, profile, as_json)


def _budgets(text: str) -> list[str]:
    from hkvprof.policy.budget import Budget

    parts = options.listed(text)
    if not parts:
        raise UsageError("--budget is empty: expected budgets such as 0.10,0.20")
    for part in parts:
        Budget.parse(part)
    if len(set(parts)) < len(parts):
        raise BudgetError(f"--budget {text} names a budget twice")
    return parts


def _write(folder: Path, answers: list[Answer]) -> None:
    from dataclasses import asdict

    from hkvprof.evaluate.compare import summarise
    from hkvprof.files import write_atomically

    lines = "".join(json.dumps(asdict(answer), sort_keys=True) + "\n" for answer in answers)
    write_atomically(folder / "answers.jsonl", lines.encode())
    summary = json.dumps([asdict(s) for s in summarise(answers)], indent=2, sort_keys=True)
    write_atomically(folder / "summary.json", (summary + "\n").encode())


def _print(answers: list[Answer], model: str, profile: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from hkvprof.evaluate.compare import summarise
    from hkvprof.report.comparison import comparison_table, next_steps

    if as_json:
        typer.echo(json.dumps([asdict(s) for s in summarise(answers)], indent=2))
        return
    Console().print(comparison_table(answers))
    for line in next_steps(model, str(profile)):
        typer.echo(line)
