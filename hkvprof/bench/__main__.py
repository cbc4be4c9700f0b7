"""`python -m hkvprof.bench`: `hkvprof bench --device cuda --shape ...` without typer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hkvprof.bench.filled import FilledSetup
from hkvprof.bench.run import bench_filled
from hkvprof.bench.table import render
from hkvprof.errors import HkvError, UsageError

DEFAULT_PATH = Path("out/bench-gpu.json")
_EPILOG = """\
examples:
  python -m hkvprof.bench
  python -m hkvprof.bench --context 32768 --batch 1,8 --json out/h200.json
  python -m hkvprof.bench --device cpu --shape tiny --context 2048 --batch 1 --prefill 1024

A run ends within --minutes and writes what it has; the same command goes on from there."""


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Of a list with commas. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{option} {text}: expected numbers such as 8192,32768")
    return tuple(map(int, parts))


def run(setup: FilledSetup, json_path: str | None) -> None:
    """Measure, save, print. `json_path` as of `--json`: None is DEFAULT_PATH, "-" prints JSON."""
    path = DEFAULT_PATH if json_path in (None, "-") else Path(str(json_path))
    path.parent.mkdir(parents=True, exist_ok=True)
    result = bench_filled(setup, path, _say)
    text = json.dumps(result.to_json(), indent=1) + "\n" if json_path == "-" else render(result)
    sys.stdout.write(text)
    sys.stderr.write(f"figures in {path}\n")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    usual = FilledSetup()
    parser = argparse.ArgumentParser(
        prog="python -m hkvprof.bench",
        description="Decoding steps of dense and compressed caches, on a GPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", default=usual.shape, help=f"random weights of it; default {usual.shape}")
    add("--layers", type=int, help="fewer than the shape has, to be quick")
    add("--context", default="8192,32768,131072", help="prompt tokens; default %(default)s")
    add("--batch", default="1,8,32", help="rows of equal length; default %(default)s")
    add("--budget", default="0.20,0.10,0.05", help="shares of dense; default %(default)s")
    add("--device", default=usual.device, help="cuda, or cpu to try it")
    add("--dtype", default=usual.dtype, help="default: bfloat16")
    add("--steps", type=int, default=usual.steps, help="timed per method; default %(default)s")
    add("--rounds", type=int, default=usual.rounds, help="turns for them; default %(default)s")
    add("--prefill", type=int, default=usual.prefill_tokens, help="tokens; default %(default)s")
    add("--minutes", type=float, default=usual.minutes, help="default %(default)s")
    add(
        "--json", nargs="?", const="-", metavar="PATH",
        help=f"the file of figures; default {DEFAULT_PATH}; without PATH that one, printed too",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where something failed, 2 for wrong usage."""
    given = _parser().parse_args(arguments)
    try:
        setup = FilledSetup(
            shape=given.shape,
            contexts=numbers(given.context, "--context"),
            batches=numbers(given.batch, "--batch"),
            budgets=tuple(part.strip() for part in given.budget.split(",")),
            layers=given.layers,
            dtype=given.dtype,
            device=given.device,
            steps=given.steps,
            rounds=given.rounds,
            prefill_tokens=given.prefill,
            link_megabytes=1024 if given.device != "cpu" else 16,
            minutes=given.minutes,
        )
        run(setup, given.json)
    except HkvError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
