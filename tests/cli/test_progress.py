"""Progress: plain lines off a terminal, a bar on one; the items pass through untouched."""

import sys

import pytest

from hkvprof.cli import progress


def test_lines_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress.track(iter("abc"), "measuring", 3)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("measuring: 1/3 (")
    assert lines[-1].startswith("measuring: 3/3 (")
    assert "0:00 left" in lines[-1]
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    list(progress.track(range(5), "x", 5))
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_an_interrupted_loop_ends_cleanly(capsys: pytest.CaptureFixture[str]) -> None:
    steps = progress.track(range(10), "x", 10)
    next(steps)
    steps.close()
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.track(range(3), "x", 3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("each", "text"), [(0, ""), (1 / 3.14, "3.1/s"), (4.0, "4.0 s each"), (-1, "")]
)
def test_rates(each: float, text: str) -> None:
    assert progress.rate(each) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (11_220, "3 h 07 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


class Clock:
    """Stands for `time`: every look at it is told how late it is."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_what_was_done_before_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """60 of 100 samples have rows: the first line after real work speaks of that work."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    said = []
    for number in progress.track(range(100), "measuring", 100):
        clock.now += 0.001 if number < 60 else 20.0
        said += capsys.readouterr().err.splitlines()
    assert said[0].startswith("measuring: 1/100 (1000.0/s, 0:00 left)")
    assert said[1] == "measuring: 61/100 (20.0 s each, 13:00 left)"
    assert all("-" not in line for line in said)


def test_more_items_than_foretold_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    list(progress.track(range(4), "x", 2))
    assert "-" not in capsys.readouterr().err
