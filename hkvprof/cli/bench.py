"""`hkvprof bench`: bytes and time of the dense caches and of a profile, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hkvprof.cli import options
from hkvprof.cli.gpu import bench_gpu, check_target, refuse_others
from hkvprof.errors import UsageError
from hkvprof.lazy import require_extra

if TYPE_CHECKING:
    from hkvprof.bench.methods import Kind
    from hkvprof.bench.prompts import PromptMaker
    from hkvprof.bench.records import BenchResult
    from hkvprof.bench.run import Setup
    from hkvprof.profile.record import Profile

EXAMPLES = """\b
Examples:
  hkvprof bench --model smollm2 --profile profiles/smollm2.hkv.safetensors \\
    --context 2048,8192 --budget 0.2,0.1,0.05 --json out.json --plot out.svg
  hkvprof bench --model tinyvl --profile profiles/tinyvl.hkv.safetensors --context 512
  hkvprof bench --shape qwen2.5-vl-7b --layers 4 --context 32768 --budget 0.1
  hkvprof bench --device cuda --shape qwen2.5-vl-7b --context 8192,32768,131072 \\
    --batch 1,8,32 --json out/bench-gpu.json
  hkvprof bench --model smollm2 --profile p.safetensors --crossover --budget 0.1"""

_DEFAULT_CONTEXT = "2048"
_LAYERS, _NEW_TOKENS, _ROUNDS = 4, 64, 8


def bench(
    model: Annotated[
        str | None, typer.Option("--model", help="Alias (`hkvprof models`), hub id or folder.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", help="Instead of --model: random weights, such as qwen2.5-vl-7b."),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, help="Layers of --shape; default 4, on a GPU all."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Profile of this model.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", help="Prompt tokens, separated by commas; default 2048."),
    ] = None,
    budget: options.Budgets = "0.20,0.10,0.05",
    only: Annotated[
        str | None,
        typer.Option("--methods", help="Of static,dynamic,profile; default: all that can be."),
    ] = None,
    crossover: Annotated[
        bool,
        typer.Option("--crossover", help="Find the context from which the profile is not slower."),
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option("--batch", help="Rows of equal length; default 1, --shape on a GPU 1,8,32."),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            "--new-tokens", min=1, help="Steps of every method; default 64, --shape on a GPU 32."
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds", min=1, help="Turns in which they are taken; default 8, --shape on a GPU 4."
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; default: torch's.")
    ] = None,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="PATH|-", help="Write JSON; - prints it alone.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PATH.svg", help="Draw bytes and time.")
    ] = None,
) -> None:
    """Measure memory and decoding time of dense and compressed caches on the same tokens."""
    from hkvprof.bench.methods import check_budgets, check_names
    from hkvprof.bench.run import Setup
    from hkvprof.profile.record import load_profile

    _check_sources(model, shape, profile, context, only, crossover)
    if shape is not None and not crossover and str(device or "").startswith("cuda"):
        refuse_others(only, plot, threads)
        bench_gpu(
            shape, layers, context, batch, budget, dtype, str(device), new_tokens, rounds, json_path
        )
        return
    rows = _one_batch(batch or "1")
    layers, new_tokens, rounds = layers or _LAYERS, new_tokens or _NEW_TOKENS, rounds or _ROUNDS
    lengths = (1,) if crossover else _lengths(context or _DEFAULT_CONTEXT)
    budgets = tuple(options.listed(budget))
    check_budgets(budgets)
    wanted = ["profile"] if crossover else options.listed(only or "")
    check_names(wanted)
    setup = Setup(
        lengths, budgets, new_tokens, rounds, rows,
        preallocated=not crossover, strict=not crossover,
    )  # fmt: skip
    json_file = None if json_path in (None, "-") else Path(str(json_path))
    for path, option in ((json_file, "--json"), (plot, "--plot")):
        check_target(path, option)
    if plot is not None:
        require_extra("matplotlib", "report")
    loaded = None if profile is None else load_profile(profile)
    with _threads(threads):
        network, profiles, prompts = (
            _shape(str(shape), layers, dtype, device, setup, wanted)
            if loaded is None
            else _model(str(model), loaded, dtype, device, setup, wanted)
        )
        source = "uniform" if profile is None else profile.name
        result = _run(network, str(model or shape), source, profiles, prompts, setup, crossover)
    _write(result, json_file, plot)
    _print(result, alone=json_path == "-")


def _one_batch(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"--batch {text}: expected a number of rows such as 1; several are for "
            "--shape with --device cuda"
        )
    return int(text)


def _check_sources(
    model: str | None,
    shape: str | None,
    profile: Path | None,
    context: str | None,
    only: str | None,
    crossover: bool,
) -> None:
    if (model is None) == (shape is None):
        raise UsageError("give --model or --shape, one of them (see `hkvprof bench --help`)")
    if shape is not None and profile is not None:
        raise UsageError("--shape makes a uniform profile of its own: leave --profile out")
    if model is not None and profile is None:
        raise UsageError(
            "--model needs --profile: make one with `hkvprof calibrate`, or give a --shape instead"
        )
    if crossover and (context is not None or only is not None):
        raise UsageError("--crossover has its own contexts and methods: leave those options out")


def _lengths(text: str) -> tuple[int, ...]:
    parts = options.listed(text)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--context {text}: expected prompt lengths in tokens such as 2048,8192")
    return tuple(int(part) for part in parts)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


def _shape(
    name: str, layers: int, dtype: str, device: str | None, setup: Setup, wanted: list[str]
) -> tuple[Any, dict[Kind, Profile], PromptMaker]:
    """Random weights, and profiles whose heads are all static, all dynamic, and in turns."""
    import numpy as np

    from hkvprof.bench.methods import COMPRESSING
    from hkvprof.bench.prompts import random_prompt
    from hkvprof.calibration.uniform import uniform_profile
    from hkvprof.cli.output import quiet_transformers, say
    from hkvprof.models.adapter import view_model
    from hkvprof.models.shapes import build_shape

    quiet_transformers()
    say(f"making {layers} layers of {name} with random weights")
    network = build_shape(name, layers, dtype, device)
    grid = view_model(network).grid
    turns = (np.arange(grid.total) % 2).reshape(grid.layers, grid.kv_heads)
    types: dict[str, Any] = {"static": "static", "dynamic": "dynamic", "profile": turns}
    made = {key: uniform_profile(network, kind) for key, kind in types.items()}
    profiles = {COMPRESSING[key]: made[key] for key in made if not wanted or key in wanted}

    def prompt(tokens: int) -> Any:
        return random_prompt(network, tokens, setup.batch, setup.new_tokens)

    return network, profiles, prompt


def _model(
    name: str, profile: Profile, dtype: str, device: str | None, setup: Setup, wanted: list[str]
) -> tuple[Any, dict[Kind, Profile], PromptMaker]:
    from hkvprof.bench.methods import variants
    from hkvprof.bench.prompts import chat_prompt
    from hkvprof.bench.run import foresee
    from hkvprof.cli.material import pictures, prose
    from hkvprof.models.outline import outline
    from hkvprof.models.processing import TextProcessor

    profiles = variants(profile, wanted)
    empty, processor = options.open_empty(name, profile)
    text = isinstance(processor, TextProcessor)
    material = prose() if text else pictures(enlarged=name != "tinyvl")

    def prompt_for(model: Any, tokens: int) -> Any:
        return chat_prompt(model, processor, material, tokens, setup.batch, setup.new_tokens)

    foresee(empty, profiles, setup, outline(empty, dtype).itemsize)
    if setup.strict:
        prompt_for(empty, min(setup.contexts))
    network, processor = options.open_model(name, dtype, device)
    return network, profiles, lambda tokens: prompt_for(network, tokens)


def _run(
    network: Any,
    name: str,
    source: str,
    profiles: dict[Kind, Profile],
    prompts: PromptMaker,
    setup: Setup,
    crossover: bool,
) -> BenchResult:
    from dataclasses import replace

    from hkvprof.bench.crossover import crossover_contexts, find_crossovers
    from hkvprof.bench.records import BenchResult
    from hkvprof.bench.regime import describe
    from hkvprof.bench.run import bench as measure
    from hkvprof.cli.output import say
    from hkvprof.models.outline import context_limit

    if crossover:
        lengths = crossover_contexts(context_limit(network))
        setup = replace(setup, contexts=tuple(n for n in lengths if _fits(prompts, n)))
    contexts = measure(network, profiles, prompts, setup, say)
    found = find_crossovers(contexts, setup.budgets) if crossover else ()
    return BenchResult(describe(network, name, source, setup), contexts, found)


def _fits(prompts: PromptMaker, tokens: int) -> bool:
    """Whether a prompt can be as short as that; the chat format or an image may take more."""
    try:
        prompts(tokens)
    except UsageError:
        return False
    return True


def _write(result: BenchResult, json_file: Path | None, plot: Path | None) -> None:
    from hkvprof.cli.output import say
    from hkvprof.files.atomic import write_atomically

    if json_file is not None:
        write_atomically(json_file, (json.dumps(result.to_json(), indent=2) + "\n").encode())
        say(f"figures in {json_file}")
    if plot is not None:
        from hkvprof.report.plot import bench_plot

        write_atomically(plot, bench_plot(result).encode())
        say(f"picture in {plot}")


def _print(result: BenchResult, alone: bool) -> None:
    from hkvprof.cli.output import stdout
    from hkvprof.report.bench import missing, notes, tables

    if alone:
        typer.echo(json.dumps(result.to_json(), indent=2))
        return
    console = stdout()
    for context in result.contexts:
        for table in tables(context):
            console.print(table)
            console.print()
        for line in missing(context):
            typer.echo(line)
    for line in notes(result):
        typer.echo(line)
