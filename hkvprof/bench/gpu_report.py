"""`python -m hkvprof.bench.gpu_report`: what a GPU has to tell first, in ten minutes.

Parts run one after the other, each in a process of its own with a time of its own. What each said
is written as soon as it ends, so that a run that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hkvprof.files.atomic import write_atomically

KEPT = 20_000
"""Characters at the end of what a part says."""
_PINNING = """
import time, torch
from hkvprof.runtime.devices import PinnedSlabs
from hkvprof.runtime.graph import CudaGraphs
slabs, device = PinnedSlabs(pinned=torch.cuda.is_available()), torch.device('cuda')
def take():
    began = time.perf_counter()
    slabs.take(100 * 2**20)
    print(f'100 MiB of pinned memory in {1e3 * (time.perf_counter() - began):.2f} ms')
take(); take(); take()
if torch.cuda.is_available():
    one = torch.ones(8, device=device)
    one.add_(1)
    CudaGraphs(device).record(lambda: one.add_(1))()
    print('after a capture')
    take(); take()
"""


@dataclass(frozen=True)
class Part:
    """A command for this Python, and the seconds that it may take."""

    name: str
    arguments: tuple[str, ...]
    seconds: int


def parts(dry: bool, folder: Path) -> list[Part]:
    """In the order of their worth; `dry`: shapes for a CPU."""
    figures = str(folder / ("dry-bench.json" if dry else "bench-gpu.json"))
    real = ("--context", "32768", "--batch", "1,8", "--minutes", "4")
    small = ("--device", "cpu", "--shape", "tiny", "--context", "512", "--batch", "1",
             "--prefill", "256", "--steps", "4", "--rounds", "2", "--minutes", "1")  # fmt: skip
    bench = ("-m", "hkvprof.bench", "--json", figures, *(small if dry else real))
    counts = ("--shape", "tiny", "--context", "16384", "--compile", "") if dry else ()
    tests = ("--collect-only",) if dry else ("-x",)
    marked = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *tests)
    return [
        Part("tests", (*marked, "tests/runtime/test_cuda.py", "tests/runtime/kernels"), 90),
        Part("pinning", ("-c", _PINNING), 30),
        Part("figures", bench, 330),
        Part("account", ("-m", "hkvprof.bench.account", *counts), 120),
    ]


def run_part(part: Part) -> dict[str, object]:
    """What it said and how it ended: `code` None where its time was over."""
    began = time.monotonic()
    command = [sys.executable, *part.arguments]
    try:
        made = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=part.seconds
        )
        code, said = made.returncode, made.stdout
    except subprocess.TimeoutExpired as error:
        code, said = None, error.stdout or b""
    seconds = round(time.monotonic() - began, 1)
    text = said.decode(errors="replace")[-KEPT:]
    return {"part": part.name, "code": code, "seconds": seconds, "said": text}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where a part failed or was cut short."""
    parser = argparse.ArgumentParser(prog="python -m hkvprof.bench.gpu_report", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="shapes for a CPU, to try it")
    parser.add_argument("--json", default="out/gpu-report.json", help="default %(default)s")
    given = parser.parse_args(arguments)
    path = Path(given.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, object]] = []
    for part in parts(given.dry, path.parent):
        done.append(run_part(part))
        write_atomically(path, (json.dumps(done, indent=1) + "\n").encode())
        last = str(done[-1]["said"]).strip().splitlines()[-1:]
        sys.stdout.write(f"{part.name}: {done[-1]['code']}, {done[-1]['seconds']} s: {last}\n")
        sys.stdout.flush()
    return int(any(one["code"] != 0 for one in done))


if __name__ == "__main__":
    sys.exit(main())
