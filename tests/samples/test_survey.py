"""What is said of samples before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.samples.read import load_samples
from hkvprof.samples.record import Sample
from hkvprof.samples.survey import Survey
from tests.samples.layouts.shown import encoded

RED = {"type": "image", "image": encoded("red")}
FILM = {"type": "video", "frames": [encoded("red"), encoded("blue")], "fps": 2.0}


def sample(name: str, *parts: Any, reply: str | None = "yes") -> Sample:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return Sample(name, "t", ({"role": "user", "content": content},), reply)


def test_counts() -> None:
    survey = Survey.of(
        [sample("a", RED, "what?"), sample("b", RED, RED, "why?", reply=None), sample("c", FILM)]
    )
    assert survey.pictures == (1, 2, 0)
    assert survey.frames == (0, 0, 2)
    assert survey.seen == 3
    assert survey.lines() == [
        "check: pictures in 2 of 3 samples, 0 to 2 (median 1) a sample, 3 in all; videos in 1, "
        "0 to 2 (median 0) frames a sample",
        "       text of 0 to 5 (median 4) characters; replies in 2, followups in 0",
    ]
    assert survey.doubts(takes_pictures=True) == []


def test_a_model_that_takes_pictures_gets_none() -> None:
    blind = Survey.of([sample("a", "one"), sample("b", "two")])
    (doubt,) = blind.doubts(takes_pictures=True)
    assert doubt.startswith("no sample has a picture, and the model takes pictures")
    assert blind.doubts(takes_pictures=False) == []
    mixed = Survey.of([sample("a", "one"), sample("b", RED, "two")])
    assert mixed.doubts(takes_pictures=True) == ["1 sample without a picture"]


def test_marks_that_nobody_replaced() -> None:
    for mark in ("<image>", "<image 2>", "<video>"):
        (doubt,) = Survey.of([sample("a", RED, f"see {mark}")]).doubts(takes_pictures=True)
        assert "'a': the model would read it as text" in doubt


def test_equal_samples() -> None:
    twice = Survey.of(
        [sample("a", RED, "x"), sample("b", RED, "x"), sample("c", RED, "x", reply="no")]
    )
    assert twice.equal == (("a", "b"),)
    assert "as 'b' and 'a'" in twice.doubts(takes_pictures=True)[0]


@given(st.lists(st.sampled_from(["x", "y", "z"]), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_as_many_are_equal_as_repeat(texts: list[str]) -> None:
    survey = Survey.of([sample(str(i), text) for i, text in enumerate(texts)])
    assert len(survey.equal) == len(texts) - len(set(texts))


def test_the_shipped_set_has_nothing_odd() -> None:
    loaded = load_samples(Path(__file__).parents[2] / "calibration" / "mini")
    survey = Survey.of(loaded.samples)
    assert survey.seen == len(loaded.samples)
    assert survey.doubts(takes_pictures=True) == []
