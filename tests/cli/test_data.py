"""`calibrate --data`: what is said of the data, and what is refused, before weights are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from hkvprof.cli import run
from tests.cli.runs import save_samples
from tests.plugins.checkpoints import CHAT, save_checkpoint
from tests.samples.layouts.shown import paint, write


class WeightsError(Exception):
    """Weights were asked for."""


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise WeightsError

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)


def llava(folder: Path, count: int = 2) -> Path:
    for number in range(count):
        paint(folder / "pictures" / f"{number}.png", "red")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    rows = [{"id": f"s{i}", "image": f"{i}.png", "conversations": said} for i in range(count)]
    return write(folder / "json" / "llava.json", rows)


def calibrate(*more: str, model: str = "tinyvl") -> int:
    return run(["calibrate", "--model", model, "-o", "p", *more])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_recognised_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = llava(here)
    assert calibrate("--data", str(path), "--image-folder", "pictures") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "recognised: conversations of LLaVA or ShareGPT (--data-format llava)"
    assert f"2 samples of 1 task from {path}" in lines
    assert any(line.startswith("check: pictures in 2 of 2 samples, 1 a sample") for line in lines)
    assert any(line.startswith("note:  1 sample like another") for line in lines)
    assert "WeightsError" in lines[-1], "samples are checked before weights"


@pytest.mark.parametrize(
    ("more", "code", "expected"),
    [
        (["--data", "json/llava.json"], 1, "record 0: field 'image': no image file 0.png in"),
        (["--data", "json", "--image-folder", "none"], 2, "--image-folder none: no such folder"),
        (["--data", "json", "--data-format", "odd"], 2, "--data-format odd: expected one of"),
        (["--data", "pictures"], 2, "pictures holds 2 pictures without questions"),
        (["--data", "data.jsonl", "--question", "x"], 2, "--question is for pictures and texts"),
        (["--data", "data.jsonl", "--image-folder", "."], 2, "of samples.jsonl lie beside it"),
    ],
)  # fmt: skip
def test_wrong_data_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, expected: str
) -> None:
    llava(here)
    save_samples(here / "data.jsonl", 2)
    assert calibrate(*more) == code
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


def test_a_folder_of_pictures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llava(here)
    assert calibrate("--data", "pictures", "--question", "What is it?") == 1
    assert "WeightsError" in capsys.readouterr().err


def test_samples_that_do_not_fit_the_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind, path = str(save_checkpoint(here / "model", CHAT)), str(llava(here))
    folder = ("--image-folder", "pictures")
    assert calibrate("--data", path, *folder, model=blind) == 1
    told = capsys.readouterr().err
    assert "2 of 2 samples have pictures, and the model" in told
    assert "WeightsError" not in told
    assert calibrate("--data", path, *folder, "--on-error", "skip", model=blind) == 1
    assert "WeightsError" in capsys.readouterr().err
    save_samples(here / "data.jsonl", 2)
    assert calibrate("--data", "data.jsonl") == 1
    assert "note:  no sample has a picture, and the model takes pictures" in capsys.readouterr().err
    part = {"type": "text", "text": "long", "modality": "context"}
    row = {"id": "a", "task": "t", "messages": [{"role": "user", "content": [part]}]}
    assert calibrate("--data", str(write(here / "context.jsonl", [row]))) == 1
    told = capsys.readouterr().err
    assert 'marked "modality": "context", and the model tinyvl takes pictures' in told
    assert "WeightsError" not in told
