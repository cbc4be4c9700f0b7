"""The committed calibration set, and the command that writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hkvprof.samples.read import load_samples
from hkvprof.testbed.calibration_set import calibration_sample, sample_record
from hkvprof.testbed.generator import TASKS
from tools.tinyvl.make_calibration import main

MINI = Path(__file__).parents[2] / "calibration" / "mini"


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    lines = (MINI / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def image_paths(record: dict[str, Any]) -> list[str]:
    content = record["messages"][0]["content"]
    return [part["path"] for part in content if part["type"] == "image"]


def test_size_and_mixture(records: list[dict[str, Any]]) -> None:
    assert len(records) >= 96
    assert len({record["id"] for record in records}) == len(records)
    assert {record["task"] for record in records} == set(TASKS)
    counts = [len(image_paths(record)) for record in records]
    assert min(counts) >= 4
    assert max(counts) == 16
    with_followups = sum(bool(record["followups"]) for record in records)
    assert len(records) / 4 < with_followups < len(records) / 2
    size = sum(path.stat().st_size for path in MINI.rglob("*") if path.is_file())
    assert size <= 4e6


def test_the_reader_takes_it(records: list[dict[str, Any]]) -> None:
    loaded = load_samples(MINI)
    assert not loaded.skipped
    assert [sample.id for sample in loaded.samples] == [record["id"] for record in records]
    assert [sample.reply for sample in loaded.samples] == [r["reply"] for r in records]


def test_images_are_there_and_all_used(records: list[dict[str, Any]]) -> None:
    named = {path for record in records for path in image_paths(record)}
    assert named == {f"images/{path.name}" for path in (MINI / "images").iterdir()}


@pytest.mark.parametrize("position", [0, 7, 28, 45, 93])
def test_committed_samples_are_what_the_command_makes(
    records: list[dict[str, Any]], position: int
) -> None:
    committed = records[position]
    made, images = sample_record(calibration_sample(committed["task"], position // len(TASKS)))
    assert made == committed
    for path, image in images.items():
        with Image.open(MINI / path) as stored:
            assert stored.convert("RGB").tobytes() == image.tobytes()


def test_the_command_is_deterministic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        assert main(["-o", str(tmp_path / name), "--per-task", "1"]) == 0
    assert "16 samples" in capsys.readouterr().out
    first, second = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (tmp_path / "first", tmp_path / "second")
    )
    assert first == second


def test_a_set_is_replaced_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples.jsonl").write_text("mine\n")
    assert main(["-o", str(tmp_path), "--per-task", "1"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "samples.jsonl").read_text() == "mine\n"
    assert main(["-o", str(tmp_path), "--per-task", "1", "--force"]) == 0
    assert main(["-o", str(tmp_path / "other"), "--per-task", "0"]) == 2
