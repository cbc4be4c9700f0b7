"""Checks that several formats share: bytes and values from strangers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hkvprof.errors import ProfileError, UsageError
from hkvprof.files import strict_json
from hkvprof.profile.bounds import require

MAX_MARKS = 8_000_000
"""Of a JSON file: SparseMM with a thousand samples of 1024 heads has a million numbers."""


def read_json(data: bytes, name: str) -> Any:
    """The value of a JSON file called `name`. Raises ProfileError."""
    try:
        return strict_json.loads(data.decode("utf-8"), most=MAX_MARKS)
    except ValueError as error:
        raise ProfileError(f"{name} is not readable JSON: {error}") from None


def to_json(value: object) -> bytes:
    """A value as the bytes of a JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()


def expect_keys(found: Mapping[str, Any], wanted: Sequence[str], shape: str) -> None:
    """Raise ProfileError unless `found` has the `wanted` keys alone, as a model of `shape` has."""
    known = set(wanted)
    lacking, other = [one for one in wanted if one not in found], [*found.keys() - known]
    if lacking or other:
        parts = [("lacks", lacking), ("has besides", sorted(other))]
        said = "; ".join(f"{what} {', '.join(some[:4])}" for what, some in parts if some)
        raise ProfileError(f"expected {shape}; the file {said}: it is of another model")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number of at least 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def whole_number(value: Any, name: str, low: int, most: int) -> int:
    """A JSON value that is a whole number within bounds. Raises ProfileError."""
    require(
        type(value) is int and low <= value <= most,
        f"{name} should be a whole number from {low} to {most}, found {value!r}",
    )
    return int(value)


def refuse_budget(budget: float | None, name: str) -> None:
    """Raise UsageError for a budget where the format `name` has one of its own."""
    if budget is not None:
        raise UsageError(f"--budget with --format {name}: its pattern says what heads keep")
