"""`hkvprof bench --device cuda --shape ...`: the options of `python -m hkvprof.bench.gpu`."""

from __future__ import annotations

from pathlib import Path

from hkvprof.cli import options
from hkvprof.cli.output import check_file
from hkvprof.errors import UsageError
from hkvprof.files.atomic import writable


def bench_gpu(
    shape: str,
    layers: int | None,
    context: str | None,
    batch: str | None,
    budget: str,
    dtype: str,
    device: str,
    steps: int | None,
    rounds: int | None,
    json_path: str | None,
) -> None:
    """Measure, save, print (docs/gpu.md). None: the benchmark's own default. Raises UsageError."""
    from hkvprof.bench.gpu.__main__ import numbers, run
    from hkvprof.bench.gpu.run import Setup
    from hkvprof.cli.output import quiet_transformers

    quiet_transformers()
    usual = Setup()
    if json_path not in (None, "-"):
        check_target(Path(str(json_path)), "--json")
    setup = Setup(
        shape=shape,
        contexts=usual.contexts if context is None else numbers(context, "--context"),
        batches=usual.batches if batch is None else numbers(batch, "--batch"),
        budgets=tuple(options.listed(budget)),
        layers=layers,
        dtype=dtype,
        device=device,
        steps=steps or usual.steps,
        rounds=rounds or usual.rounds,
    )
    run(setup, json_path)


def refuse_others(only: str | None, plot: Path | None, threads: int | None) -> None:
    """Raise UsageError for options of the other benchmarks."""
    given = {"--methods": only, "--plot": plot, "--threads": threads}
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} is not for --shape on a GPU, where all methods run side by side and "
                "figures are JSON and text: leave it out"
            )


def check_target(path: Path | None, option: str) -> None:
    """Raise UsageError unless `path` can be written: called before anything is loaded."""
    if path is None:
        return
    check_file(path, option)
    if not writable(path.absolute().parent):
        raise UsageError(f"cannot write to {path}: give {option} a file in a writable folder")
