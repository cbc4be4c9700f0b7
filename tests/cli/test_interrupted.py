"""Ctrl-C says what was kept: rows, answers, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from hkvprof.cli import run
from hkvprof.cli.errors import INTERRUPTED
from tests.cli.runs import save_samples
from tests.plugins.checkpoints import CHAT, save_checkpoint


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", CHAT)
    save_samples(tmp_path / "data.jsonl", 4)
    return tmp_path


def stop_after(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    """Ctrl-C while item number `count` + 1 is worked on, in the loop of that name."""

    def track(items: object, description: str, total: int) -> object:
        for number, item in enumerate(items):  # type: ignore[var-annotated, arg-type]
            if description == name and number == count:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr("hkvprof.cli.progress.track", track)


@pytest.mark.parametrize("kept", [0, 2])
def test_an_evaluation(
    place: Path, kept: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(monkeypatch, "answering", kept)
    model, out = place / "model", place / "out"
    line = ["eval", "--model", model, "--profile", model / "profile.safetensors", "--tasks",
            place / "data.jsonl", "--budget", "0.5", "--steps", "2", "-o", out,
            "--no-plot"]  # fmt: skip
    assert run([str(word) for word in line]) == INTERRUPTED
    said = capsys.readouterr().err.splitlines()[-1]
    if kept:
        assert said.startswith("interrupted (")
        assert said.endswith(f"answers kept in {out}: run again to go on)")
    else:
        assert said == "interrupted; nothing was written"
        assert not list(out.glob("*.jsonl"))


@pytest.mark.parametrize("kept", [0, 2])
def test_a_calibration(
    place: Path, kept: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(monkeypatch, "measuring heads", kept)
    line = ["calibrate", "--model", place / "model", "--data", place / "data.jsonl", "-o",
            place / "p"]  # fmt: skip
    assert run([str(word) for word in line]) == INTERRUPTED
    said = capsys.readouterr().err.splitlines()[-1]
    expected = f"(2 of 4 samples are measured in {place / 'p.rows'}: run again to go on)"
    assert said == (f"interrupted {expected}" if kept else "interrupted; nothing was written")
