"""`hkvprof demo`: what it runs, in which folder, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hkvprof.cli import demo as running
from hkvprof.cli import run


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Command lines that are run within, which make their files and succeed."""
    monkeypatch.chdir(tmp_path)
    ran: list[list[str]] = []

    def record(_: Any, words: list[str]) -> int:
        ran.append(words)
        return 0

    monkeypatch.setattr(running, "run_command", record)
    return ran


def test_the_way_from_samples_to_figures(
    lines: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hkvprof.samples.read import load_samples

    assert run(["demo", "--quick"]) == 0
    assert [line[0] for line in lines] == ["calibrate", "inspect", "eval"]
    made = tmp_path / "hkvprof-demo"
    assert len(load_samples(made / "samples").samples) == 16
    assert lines[0][:6] == [
        "calibrate", "--model", "tinyvl", "--data", "hkvprof-demo/samples", "-o",
    ]  # fmt: skip
    profile = lines[0][6]
    assert lines[1] == ["inspect", profile]
    assert profile in lines[2]
    out = capsys.readouterr().out
    for line in lines:
        assert f"$ hkvprof {' '.join(line)}\n" in out
    assert out.count(" s)\n") == 4
    assert "All in " in out


def test_without_matplotlib_there_is_no_plot(
    lines: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "--quick"]) == 0
    monkeypatch.setattr(running, "find_spec", lambda name: None)
    assert run(["demo", "--quick"]) == 0
    assert ["--no-plot" in line for line in lines] == [False] * 5 + [True]
    assert capsys.readouterr().out.count("pip install 'hkvprof[report]'\n") == 1


def test_it_is_made_anew(lines: list[list[str]], tmp_path: Path) -> None:
    """Answers of an earlier demo, perhaps with other versions, do not count."""
    for _ in range(2):
        assert run(["demo", "--quick", "-o", "here"]) == 0
        (tmp_path / "here" / "tinyvl.profile.safetensors").write_text("x")
        (tmp_path / "here" / "eval").mkdir(exist_ok=True)
        (tmp_path / "here" / "eval" / "answers.jsonl").write_text("odd")
    assert run(["demo", "--quick", "-o", "here"]) == 0
    assert not (tmp_path / "here" / "eval").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("mine", "holds other things (notes.txt)"), ("mine/notes.txt", "cannot write into")],
)
def test_other_s_folders_are_left_alone(
    name: str, said: str, lines: list[list[str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    assert run(["demo", "-o", name]) == 2
    assert said in capsys.readouterr().err
    assert lines == []
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_what_fails_within_ends_it(lines: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "run_command", lambda _, words: lines.append(words) or 7)
    assert run(["demo", "--quick"]) == 7
    assert len(lines) == 1
