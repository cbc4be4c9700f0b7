"""`hkvprof bench`: bytes and time of the dense caches and of a profile, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hkvprof.cli import options
from hkvprof.cli.output import check_file
from hkvprof.errors import UsageError
from hkvprof.files.atomic import writable
from hkvprof.lazy import require_extra

if TYPE_CHECKING:
    from hkvprof.bench.methods import Kind
    from hkvprof.bench.prompts import Material, PromptMaker, PromptSetup
    from hkvprof.bench.records import BenchResult
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
_IMAGES_PER_SCENE, _SCENES_PER_ROW = 16, 10_000
_PIXELS = 448
"""Side of an image for other models than tinyvl, whose images have 112."""


def bench(
    model: Annotated[
        str | None,
        typer.Option("--model", help="Alias (`hkvprof models`), hub id, folder or GGUF file."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="vllm: requests at once inside it, beside plain vLLM."),
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
    fetch: options.Fetch = None,
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
        Path | None,
        typer.Option(
            "--plot", metavar="PATH.svg", help="Draw bytes and time (needs `hkvprof[report]`)."
        ),
    ] = None,
) -> None:
    """Measure memory and decoding time of dense and compressed caches on the same tokens."""
    from hkvprof.bench.methods import check_names
    from hkvprof.bench.table import render
    from hkvprof.profile.record import load_profile

    if engine is not None:
        _bench_engine(engine, model, profile, context, budget, new_tokens, rounds, json_path)
        return
    _check_sources(model, shape, profile, context, only, crossover)
    if shape is not None and not crossover and str(device or "").startswith("cuda"):
        _refuse_on_gpu({"--methods": only, "--plot": plot, "--threads": threads,
                        "--fetch": fetch})  # fmt: skip
        given = {"shape": shape, "layers": layers, "context": context, "batch": batch,
                 "budget": budget, "dtype": dtype, "device": device, "steps": new_tokens,
                 "rounds": rounds, "json": json_path}  # fmt: skip
        _bench_filled(given)
        return
    setup = _setup(context, budget, fetch, new_tokens, rounds, batch, crossover)
    wanted = ["profile"] if crossover else options.listed(only or "")
    check_names(wanted)
    json_file = None if json_path in (None, "-") else Path(str(json_path))
    for path, option in ((json_file, "--json"), (plot, "--plot")):
        _check_target(path, option)
    if plot is not None:
        require_extra("matplotlib", "report")
    loaded = None if profile is None else load_profile(profile)
    with _threads(threads):
        source = (
            _shape(str(shape), layers or _LAYERS, dtype, device, setup, wanted)
            if loaded is None
            else _model(str(model), loaded, dtype, device, setup, wanted)
        )
        names = str(model or shape), "uniform" if profile is None else profile.name
        result = _measure(source, names, setup, crossover)
    _write(result, json_file, plot)
    text = render(result) if json_path != "-" else json.dumps(result.to_json(), indent=1) + "\n"
    typer.echo(text, nl=False)


def _bench_engine(
    engine: str,
    model: str | None,
    profile: Path | None,
    context: str | None,
    budget: str,
    new_tokens: int | None,
    rounds: int | None,
    json_path: str | None,
) -> None:
    """`--engine vllm`: it runs in the environment that vLLM is installed in. Raises UsageError."""
    if engine != "vllm":
        raise UsageError(f"--engine {engine}: expected vllm")
    if model is None or profile is None:
        raise UsageError("--engine vllm needs --model (a folder or hub id) and --profile")
    if not (context or _DEFAULT_CONTEXT).isdecimal():
        raise UsageError(f"--context {context}: --engine takes one prompt length such as 2048")
    from hkvprof.cli.output import say
    from hkvprof.engines.vllm.bench import EngineSetup, measure, render
    from hkvprof.files.atomic import write_atomically

    target = None if json_path in (None, "-") else Path(str(json_path))
    _check_target(target, "--json")
    setup = EngineSetup(
        model, str(profile), tuple(options.listed(budget)), int(context or _DEFAULT_CONTEXT),
        new_tokens or _NEW_TOKENS, rounds=rounds or _ROUNDS,
    )  # fmt: skip
    figures = measure(setup, say)
    text = json.dumps(figures, indent=1) + "\n"
    if target is not None:
        write_atomically(target, text.encode())
    typer.echo(text if json_path == "-" else render(figures), nl=False)


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


def _refuse_on_gpu(given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} is not for --shape on a GPU, where all methods run side by side and "
                "figures are JSON and text: leave it out"
            )


def _check_target(path: Path | None, option: str) -> None:
    """Raise UsageError unless `path` can be written: called before anything is loaded."""
    if path is None:
        return
    check_file(path, option)
    if not writable(path.absolute().parent):
        raise UsageError(f"cannot write to {path}: give {option} a file in a writable folder")


def _bench_filled(given: dict[str, Any]) -> None:
    """`python -m hkvprof.bench` (docs/gpu.md); what was not given is that command's default."""
    from hkvprof.bench.__main__ import main as run
    from hkvprof.cli.output import quiet_transformers

    quiet_transformers()
    if given["json"] not in (None, "-"):
        _check_target(Path(given["json"]), "--json")
    code = run([f"--{name}={value}" for name, value in given.items() if value is not None])
    if code:
        raise typer.Exit(code)


def _setup(
    context: str | None,
    budget: str,
    fetch: str | None,
    new_tokens: int | None,
    rounds: int | None,
    batch: str | None,
    crossover: bool,
) -> PromptSetup:
    """Where prompts are read. Contexts of a crossover follow from the model. Raises UsageError."""
    from hkvprof.bench.methods import check_budgets
    from hkvprof.bench.prompts import PromptSetup

    rows = batch or "1"
    if not rows.isdecimal() or int(rows) < 1:
        raise UsageError(
            f"--batch {rows}: expected a number of rows such as 1; several are for "
            "--shape with --device cuda"
        )
    lengths = options.listed("1" if crossover else context or _DEFAULT_CONTEXT)
    if not lengths or not all(part.isdecimal() and int(part) > 0 for part in lengths):
        raise UsageError(
            f"--context {context}: expected prompt lengths in tokens such as 2048,8192"
        )
    budgets = tuple(options.listed(budget))
    check_budgets(budgets)
    return PromptSetup(
        tuple(map(int, lengths)), budgets, new_tokens or _NEW_TOKENS, rounds or _ROUNDS, int(rows),
        preallocated=not crossover, strict=not crossover, fetch=fetch,
    )  # fmt: skip


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
    name: str, layers: int, dtype: str, device: str | None, setup: PromptSetup, wanted: list[str]
) -> tuple[Any, dict[Kind, Profile], PromptMaker]:
    """Random weights, and profiles whose heads are all static, all dynamic, and in turns."""
    from hkvprof.bench.methods import COMPRESSING, uniform_types
    from hkvprof.bench.prompts import random_prompt
    from hkvprof.calibration.uniform import uniform_profile
    from hkvprof.cli.output import quiet_transformers, say
    from hkvprof.models.adapter import view_model
    from hkvprof.models.shapes import build_shape

    quiet_transformers()
    say(f"making {layers} layers of {name} with random weights")
    model = build_shape(name, layers, dtype, device)
    options.advise(model)
    types = uniform_types(view_model(model).grid)
    kinds = [kind for key, kind in COMPRESSING.items() if not wanted or key in wanted]
    profiles = {kind: uniform_profile(model, types[kind]) for kind in kinds}
    rows, steps = setup.batch, setup.new_tokens
    return model, profiles, lambda tokens: random_prompt(model, tokens, rows, steps)


def _model(
    name: str,
    profile: Profile,
    dtype: str,
    device: str | None,
    setup: PromptSetup,
    wanted: list[str],
) -> tuple[Any, dict[Kind, Profile], PromptMaker]:
    """A model and its profile; what needs no weights is checked before they are loaded."""
    from hkvprof.bench.methods import variants
    from hkvprof.bench.prompts import chat_prompt
    from hkvprof.bench.run import foresee
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
    model, processor = options.open_model(name, dtype, device)
    return model, profiles, lambda tokens: prompt_for(model, tokens)


def prose() -> Material:
    """Held-out paragraphs of the long-text tasks."""
    from hkvprof.bench.prompts import Material
    from hkvprof.evaluate.longtext import JOINT, paragraphs

    opening = "Read this and answer the question after it."
    return Material(opening, JOINT.join(paragraphs("heldout")))


def pictures(enlarged: bool) -> Material:
    """Images of the embedded model's generator with their captions; then tinyvl's own words or, for
    enlarged ones, prose."""
    from hkvprof.bench.prompts import Material

    def images(row: int, count: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for number, first in enumerate(range(0, count, _IMAGES_PER_SCENE)):
            seed = row * _SCENES_PER_ROW + number
            parts += _scene(seed, min(_IMAGES_PER_SCENE, count - first), enlarged)
        return parts

    if enlarged:
        return Material(prose().opening, prose().text, images)
    question = "read row B of image #1"
    return Material(question, f"{question} " * 8, images)


def _scene(seed: int, images: int, enlarged: bool) -> list[dict[str, Any]]:
    """Images and captions of a held-out sample, without its question."""
    from hkvprof.testbed.generator import make_sample

    sample = make_sample("ocr", seed, images=images, split="heldout")
    parts = [dict(part) for part in sample.messages[0]["content"][:-1]]
    for part in parts:
        if enlarged and part["type"] == "image":
            part["image"] = part["image"].resize((_PIXELS, _PIXELS), resample=0)
    return parts


def _measure(
    source: tuple[Any, dict[Kind, Profile], PromptMaker],
    names: tuple[str, str],
    setup: PromptSetup,
    crossover: bool,
) -> BenchResult:
    """`names` are the model's and its profile's."""
    from dataclasses import replace

    from hkvprof.bench.compare import crossover_contexts, find_crossovers
    from hkvprof.bench.records import BenchResult
    from hkvprof.bench.run import bench_prompts, describe
    from hkvprof.cli.output import say
    from hkvprof.models.outline import context_limit

    model, _, prompts = source
    if crossover:
        lengths = crossover_contexts(context_limit(model))
        setup = replace(setup, contexts=tuple(n for n in lengths if _fits(prompts, n)))
    contexts = bench_prompts(*source, setup, say)
    crossovers = find_crossovers(contexts, setup.budgets) if crossover else ()
    return BenchResult(describe(model, *names, setup), contexts, crossovers)


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
        result.save(json_file)
        say(f"figures in {json_file}")
    if plot is not None:
        from hkvprof.report.plot import bench_plot

        write_atomically(plot, bench_plot(result).encode())
        say(f"picture in {plot}")
