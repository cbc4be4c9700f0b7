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
    ("speed", "text"), [(0, ""), (3.14, "3.1/s"), (0.25, "4.0 s each"), (-1, "")]
)
def test_rates(speed: float, text: str) -> None:
    assert progress.rate(speed) == text
