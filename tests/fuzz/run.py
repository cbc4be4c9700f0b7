"""`python -m tests.fuzz.run`: mutate what strangers may send, and see that only HkvError comes out.

Every mutant is loaded and, where it is accepted, used. A mutant fails if another error (or a
warning) comes out, if it takes over a second of processor time, or if the process grows beyond a
GiB. A failure is saved with what makes it again: `--only TARGET:NUMBER` with the same --seed.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hkvprof.errors import HkvError
from tests.fuzz.samples import Samples
from tests.fuzz.targets import Case, Profiles, Rows, Target, check_message

MOST_SECONDS = 1.0
MOST_BYTES = 2**30
_EVERY_SECONDS = 10.0


@dataclass
class Tally:
    """What came of one target's mutants."""

    target: str
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    slowest_case: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    failures: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """Mutants so far."""
        return self.accepted + self.refused + len(self.failures)

    def line(self) -> str:
        """One row of the table."""
        return (
            f"{self.target:<9} {self.count:>8,} {self.refused:>9,} {self.accepted:>9,} "
            f"{len(self.failures):>8,} {1000 * self.slowest:>11,.0f} "
            f"{self.peak_bytes / 2**20:>9,.0f} {1000 * self.seconds / max(self.count, 1):>8.2f}  "
            f"{self.slowest_case}"
        )


HEAD = (
    f"{'target':<9} {'mutants':>8} {'refused':>9} {'accepted':>9} {'failures':>8} "
    f"{'slowest, ms':>11} {'peak, MiB':>9} {'mean, ms':>8}  slowest case"
)


def attempt(target: Target, case: Case, folder: Path, tally: Tally) -> str:
    """Make the mutant, load it, use it; "" or what went wrong."""
    random = case.random()
    target.mutate(random, folder)
    begin = time.process_time()
    wrong = ""
    try:
        loaded = target.load(folder)
        took = time.process_time() - begin
        target.use(random, loaded)
    except HkvError as error:
        took = time.process_time() - begin
        wrong = _check(error)
        tally.refused += not wrong
        tally.reasons[type(error).__name__] += 1
    except (Exception, RecursionError):
        took = time.process_time() - begin
        wrong = traceback.format_exc()
    else:
        tally.accepted += 1
    tally.seconds += took
    if took > tally.slowest:
        tally.slowest, tally.slowest_case = took, str(case)
    if not wrong and took > MOST_SECONDS:
        wrong = f"loading took {took:.2f} s of processor time"
    return wrong


def _check(error: HkvError) -> str:
    try:
        check_message(error)
    except (AssertionError, UnicodeEncodeError):
        return traceback.format_exc()
    return ""


def fuzz(
    name: str, target: Target, numbers: Iterable[int], seed: int, keep: Path | None, total: int
) -> Tally:
    """Try all numbers; failures are saved under `keep`."""
    tally, said, start = Tally(name), time.monotonic(), time.monotonic()
    before = peak_bytes()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in numbers:
            case = Case(name, seed, number)
            wrong = attempt(target, case, Path(folder), tally)
            peak = peak_bytes()
            if peak - before > MOST_BYTES >= tally.peak_bytes - before:
                wrong = wrong or f"the process has grown by {peak - before:,} bytes"
            tally.peak_bytes = peak
            if wrong:
                tally.failures.append(f"{case}: {wrong}")
                _save(target, case, Path(folder), keep, wrong)
            if keep is not None and time.monotonic() - said > _EVERY_SECONDS:
                said = time.monotonic()
                _progress(tally, total, said - start)
    return tally


def _save(target: Target, case: Case, folder: Path, keep: Path | None, wrong: str) -> None:
    if keep is None:
        return
    place = keep / str(case)
    shutil.copytree(folder, place, dirs_exist_ok=True)
    if isinstance(target, Samples):
        target.keep(place)
    again = f"python -m tests.fuzz.run --only {case.target}:{case.number} --seed {case.seed}"
    (place / "why.txt").write_text(f"{again}\n\n{wrong}\n", "utf-8", "replace")


def _progress(tally: Tally, total: int, seconds: float) -> None:
    left = (total - tally.count) * seconds / max(tally.count, 1)
    say(
        f"{tally.target}: {tally.count:,} of {total:,}, {tally.accepted:,} accepted, "
        f"{len(tally.failures)} failures, {left / 60:.0f} min left"
    )


def say(text: str) -> None:
    """A line at once, also into a file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def peak_bytes() -> int:
    """Most memory that this process has had resident (getrusage, KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_address_space(room: int) -> None:
    """Let the process map no more than `room` bytes beyond what it has mapped: huge claims fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def make_target(name: str, home: Path) -> Target:
    """The target of a name; `home` is a folder of its own."""
    if name == "profiles":
        return Profiles()
    return Rows(home / "rows") if name == "rows" else Samples(home / "samples")


def main() -> int:
    """Parse, run, print the table; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.fuzz.run")
    for name in ("profiles", "samples", "rows"):
        parser.add_argument(f"--{name}", type=int, default=0, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--only", help="one mutant again, as TARGET:NUMBER")
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="where failures go")
    given = parser.parse_args()
    limit_address_space(MOST_BYTES)
    if given.only:
        name, number = given.only.split(":")
        wanted = {name: range(int(number), int(number) + 1)}
    else:
        names = ("profiles", "samples", "rows")
        wanted = {n: range(given.first, given.first + getattr(given, n)) for n in names}
    tallies = []
    with tempfile.TemporaryDirectory() as home:
        for name, numbers in wanted.items():
            if numbers:
                target = make_target(name, Path(home))
                tallies.append(fuzz(name, target, numbers, given.seed, given.keep, len(numbers)))
    say("\n".join([HEAD, *(tally.line() for tally in tallies)]))
    failures = [failure for tally in tallies for failure in tally.failures]
    for failure in failures[:20]:
        say(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
