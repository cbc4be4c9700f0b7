"""The record: there and back, and whatever is not sound is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hkvprof.errors import ProfileError
from hkvprof.profile.confidence import Confidence
from tests.calibration.made_rows import SHAPE, assess, make_rows


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return assess(make_rows({"a": 3, "b": 3}, noise=1.0)).to_json()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), []), (("samples",), -1), (("samples",), True), (("heads",), None),
        (("heads", "agree"), [[1.0]]), (("heads", "low", 0), "x"), (("heads", "high", 0, 0), 1.5),
        (("heads", "high", 0, 0), float("nan")), (("halves",), None), (("halves", "kappa"), [1, 2]),
        (("halves", "kappa", 0), -2), (("halves", "types", 1), 2), (("halves", "repeats"), 1.5),
        (("halves", "types"), [0.5, 0.6, 0.7]), (("tasks", "resamples"), "many"),
        (("by_task",), []), (("by_task", "a"), 1), (("by_task", "a", "types"), "x"),
        (("kinds",), {"reason": 1}), (("kinds",), {"reason": ""}), (("reason",), None),
    ],
)  # fmt: skip
def test_records_that_are_not_sound_are_refused(
    record: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    assert Confidence.from_json(record, SHAPE).to_json() == record
    if path:
        damaged = json.loads(json.dumps(record))
        place = damaged
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    else:
        damaged = value
    with pytest.raises(ProfileError, match=r"expected .* found .* again"):
        Confidence.from_json(damaged, SHAPE)


def test_a_record_of_another_grid_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match="expected 3 lists of 5 numbers"):
        Confidence.from_json(record, (3, 5))
