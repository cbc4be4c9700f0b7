"""The report's parts: bounded, written as they come, and able to run where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hkvprof.bench import gpu_report
from hkvprof.bench.gpu_report import Part, main, parts, run_part


def test_all_parts_end_within_ten_minutes(tmp_path: Path) -> None:
    assert sum(part.seconds for part in parts(False, tmp_path)) <= 600
    assert [p.name for p in parts(True, tmp_path)] == [p.name for p in parts(False, tmp_path)]


def test_what_is_cut_short_keeps_what_it_said() -> None:
    made = run_part(Part("slow", ("-uc", "import time; print('begun'); time.sleep(60)"), 5))
    assert (made["code"], made["said"]) == (None, "begun\n")


def test_a_failure_stops_no_later_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Part("bad", ("-c", "raise SystemExit(3)"), 20), Part("good", ("-c", "print(7)"), 20)]
    monkeypatch.setattr(gpu_report, "parts", lambda dry, folder: made)
    path = tmp_path / "report.json"
    assert main(["--json", str(path)]) == 1
    assert [(p["part"], p["code"]) for p in json.loads(path.read_text())] == [
        ("bad", 3),
        ("good", 0),
    ]


@pytest.mark.slow
def test_a_dry_run(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert main(["--dry", "--json", str(path)]) == 0
    assert [part["code"] for part in json.loads(path.read_text())] == [0] * 4
