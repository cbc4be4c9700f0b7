"""`hkvprof reproduce`: a published experiment, run anew on the benchmarks' own files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hkvprof.cli import options
from hkvprof.cli.errors import FAILURE
from hkvprof.errors import SampleError, UsageError

if TYPE_CHECKING:
    from hkvprof.evaluate.reproduce.benchmarks import Benchmark
    from hkvprof.evaluate.reproduce.check import Choice, Found
    from hkvprof.evaluate.reproduce.run import AnswersPlace, Asked
    from hkvprof.evaluate.reproduce.scoring import BenchmarkScore
    from hkvprof.evaluate.scorers.judge import Judge

EXAMPLES = """\b
Examples:
  hkvprof reproduce hybridkv /data --model qwen2.5-vl-7b --check
  hkvprof reproduce hybridkv /data --model qwen2.5-vl-7b --max-samples 8 -o try/
  hkvprof reproduce hybridkv /data --model qwen2.5-vl-7b --shard 1/4 -o out/
  hkvprof reproduce hybridkv /data --model qwen2.5-vl-7b --only video-chatgpt \\
      --judge https://api.openai.com/v1 --judge-model gpt-4o-mini -o out/

The folders below /data, and what differs from the paper: docs/reproduce.md."""
_DATA_HELP = "Folder with MileBench/, VATEX/, NExT-OE/ and Video-ChatGPT/."
_SHARD_HELP = "Part I of N of every benchmark's samples, as I/N, into the same -o."


@dataclass(frozen=True)
class _Work:
    """What is asked where, and by whom it is judged."""

    benchmarks: tuple[Benchmark, ...]
    data: Path
    choice: Choice
    place: AnswersPlace
    judge: Judge | None


def reproduce(
    study: Annotated[Literal["hybridkv"], typer.Argument(help="Which paper.")],
    data: Annotated[Path, typer.Argument(metavar="DATA_DIR", help=_DATA_HELP)],
    model: options.Model,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", help="Profile of this model; default: as calibrate names it."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say which files are missing, and stop.")
    ] = False,
    image_tasks: Annotated[
        str, typer.Option("--image-tasks", help="Tasks of MileBench; default: all that are there.")
    ] = "",
    only: Annotated[
        str, typer.Option("--only", help="Some of the benchmarks, such as vatex,ALFRED.")
    ] = "",
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", min=1, help="Samples of each, to try it out.")
    ] = None,
    max_frames: Annotated[
        int, typer.Option("--max-frames", min=1, help="Frames of a video, evenly spread.")
    ] = 16,
    frames: Annotated[
        bool, typer.Option("--frames", help="Show videos as images, to models without video input.")
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="URL", help="OpenAI-compatible, for Video-ChatGPT."),
    ] = None,
    judge_model: Annotated[
        str, typer.Option("--judge-model", help="The judge's name there.")
    ] = "gpt-3.5-turbo",
    shard: Annotated[str, typer.Option("--shard", help=_SHARD_HELP)] = "1/1",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder to fill; a run that was stopped goes on."),
    ] = Path("reproduce-hybridkv"),
    as_json: Annotated[bool, typer.Option("--json", help="Print figures, or what is missing, as "
                                          "JSON.")] = False,
) -> None:  # fmt: skip
    """Run a paper's benchmarks, budgets and methods; report beside its published figures."""
    from hkvprof.cli.output import check_folder, default_profile_path
    from hkvprof.evaluate.reproduce import benchmarks as known
    from hkvprof.evaluate.reproduce.check import Choice, require_whole
    from hkvprof.evaluate.reproduce.run import AnswersPlace

    if not data.is_dir():
        raise SampleError(f"no folder {data}: expected one with {known.IMAGES}/, VATEX/, NExT-OE/ "
                         "and Video-ChatGPT/")  # fmt: skip
    listed = known.all_benchmarks(data, options.listed(image_tasks))
    work = _Work(
        tuple(known.chosen(listed, options.listed(only))), data,
        Choice(max_samples, max_frames, as_video=not frames),
        AnswersPlace(output, options.parse_shard(shard)), _judge(judge, judge_model, data),
    )  # fmt: skip
    found = _look(work)
    path = profile or default_profile_path(model)
    if check:
        _say_missing(work, found, path, as_json)
        return
    require_whole(found)
    _require_beside(work, path, model)
    check_folder(output)
    scores = _run(work, model, path, dtype, device)
    _report(work, scores, model, as_json)


def _judge(url: str | None, name: str, data: Path) -> Judge | None:
    from hkvprof.evaluate.reproduce.benchmarks import VIDEO_CHATGPT
    from hkvprof.evaluate.scorers.judge import SCRIPTS, Judge, check_judge

    if url is None:
        return None
    check_judge(url)
    folder = VIDEO_CHATGPT.folder(data)
    scripts = folder / SCRIPTS if folder and (folder / SCRIPTS).is_dir() else None
    return Judge(url, name, scripts)


def _look(work: _Work) -> list[Found]:
    from hkvprof.cli.progress import track
    from hkvprof.evaluate.reproduce.check import look

    every = track(work.benchmarks, "checking files", len(work.benchmarks))
    return [look(benchmark, work.data, work.choice) for benchmark in every]


def _beside(work: _Work, profile: Path) -> list[str]:
    """What is missing beside the data: the profile, and what a metric needs."""
    from hkvprof.evaluate.metrics import ROUGE_L, check_installed
    from hkvprof.evaluate.scorers.wups import check_wordnet

    missing = []
    if not profile.is_file():
        missing.append(
            f"no profile {profile}: make one on samples that are none of these benchmarks', "
            "hkvprof calibrate --model MODEL --data YOUR_SAMPLES, or name one with --profile"
        )
    figures = {benchmark.figure for benchmark in work.benchmarks}
    checks = ((check_wordnet, {"wups"}), (lambda: check_installed([ROUGE_L]), {"cider", "judge"}))
    for needed, whose in checks:
        try:
            if figures & whose:
                needed()
        except UsageError as error:
            missing.append(str(error))
    return missing


def _require_beside(work: _Work, profile: Path, model: str) -> None:
    for line in _beside(work, profile):
        raise UsageError(line.replace("MODEL", model, 1))


def _say_missing(work: _Work, found: Sequence[Found], profile: Path, as_json: bool) -> None:
    """Every missing file, and the exit code of a failure if there is one."""
    from hkvprof.evaluate.reproduce.benchmarks import IMAGE_TASKS, IMAGES

    beside = _beside(work, profile)
    if as_json:
        told = {"benchmarks": [one.to_json() for one in found], "beside": beside}
        typer.echo(json.dumps(told, indent=2))
    else:
        for one in found:
            typer.echo(f"{one.benchmark}: {one.ready} of {one.questions} questions can be asked")
            for line in one.missing:
                typer.echo(f"  missing: {line}")
        for line in beside:
            typer.echo(f"missing: {line}")
        images = sum(one.benchmark.startswith(f"{IMAGES}/") for one in found)
        if images != IMAGE_TASKS:
            typer.echo(f"{IMAGES}: {images} tasks, and the paper averages {IMAGE_TASKS}: name them "
                       "with --image-tasks")  # fmt: skip
    if beside or not all(one.is_whole for one in found):
        raise typer.Exit(FAILURE)


def _run(
    work: _Work, model: str, path: Path, dtype: str, device: str | None
) -> list[BenchmarkScore]:
    """Answer, judge, and score what is there."""
    from hkvprof.cli.output import say
    from hkvprof.cli.progress import track
    from hkvprof.evaluate.belonging import file_digest
    from hkvprof.evaluate.contest import ProfiledModel
    from hkvprof.evaluate.counting import SERVED_ITEMSIZE
    from hkvprof.evaluate.reproduce import run
    from hkvprof.evaluate.reproduce.check import load
    from hkvprof.models.adapter import view_model
    from hkvprof.profile.record import load_profile

    profile = load_profile(path)
    _, processor = options.open_empty(model, profile)
    asked = {one: load(one, work.data, work.choice) for one in work.benchmarks}
    _check_videos(work, asked, processor)
    comparison = run.plan(SERVED_ITEMSIZE if dtype == "float32" else None)
    digest = file_digest(path)
    known: dict[Benchmark, dict[str, Any]] = {
        one: {"profile": digest, **run.conditions(one, work.choice, comparison)} for one in asked
    }
    run.check_all(work.place, known)
    network, processor = options.open_model(model, dtype, device)
    for told in known.values():
        told["model"] = view_model(network).fingerprint.weights_digest or model
        told["dtype"] = str(network.dtype).removeprefix("torch.")
    profiled = ProfiledModel(network, processor, profile)
    refused = run.answer_all(profiled, asked, known, comparison, work.place, track)
    for name, entries in refused.items():
        for entry, reason in entries.items():
            say(f"{name}: {entry.method} at {entry.budget} has no answer to some prompts: {reason}")
    if work.judge is not None:
        run.judge_all(asked, comparison, work.place, work.judge, track)
    judge = work.judge.name if work.judge else None
    return run.scores(asked, comparison, work.place, judge)


def _check_videos(work: _Work, asked: Asked, processor: Any) -> None:
    """Before weights load: the processor takes a video. Raises UsageError if it does not."""
    from hkvprof.samples.read import open_images

    films = (tasks for one, tasks in asked.items() if one.figure != "percent")
    sample = next((tasks.samples[0] for tasks in films), None)
    if sample is not None and work.choice.as_video:
        try:
            processor.encode([open_images(sample)])
        except SampleError as error:
            raise UsageError(f"{error} (--frames does)") from None


def _report(work: _Work, scores: Sequence[BenchmarkScore], model: str, as_json: bool) -> None:
    from hkvprof.cli.output import say, stdout
    from hkvprof.files.atomic import write_atomically
    from hkvprof.report.reproduction import notes, reproduction_page, reproduction_table

    folder, judge = work.place.output, work.judge.name if work.judge else ""
    told = json.dumps({"model": model, "judge": judge, "scores": [s.to_json() for s in scores]},
                      indent=2) + "\n"  # fmt: skip
    write_atomically(folder / "scores.json", told.encode())
    write_atomically(folder / "report.md", reproduction_page(scores, model, judge).encode())
    if as_json:
        typer.echo(told, nl=False)
    else:
        stdout().print(reproduction_table(scores, model))
        for line in notes(scores, model):
            typer.echo(line)
    say(f"report.md and scores.json in {folder}")
