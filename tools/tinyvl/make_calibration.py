"""Write a calibration set: `python -m tools.tinyvl.make_calibration -o calibration/mini`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hkvprof.errors import HkvError
from hkvprof.testbed.calibration_set import SHAPES, write_calibration_set


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.tinyvl.make_calibration")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the set")
    parser.add_argument("--per-task", type=int, default=len(SHAPES), help="samples of each task")
    parser.add_argument("--force", action="store_true", help="replace a set that is there")
    options = parser.parse_args(arguments)
    try:
        count = write_calibration_set(options.output, options.per_task, options.force)
    except HkvError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    files = [path for path in options.output.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    sys.stdout.write(f"{count} samples in {options.output}: {len(files)} files, {size:.2f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
