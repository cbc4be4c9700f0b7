"""`hkvprof export`, `import` and `validate --format`: output, files and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hkvprof.cli import run
from hkvprof.profile.formats import FORMATS
from hkvprof.profile.record import load_profile
from tests.profiles import make_profile

TINYVL = "profiles/tinyvl.hkv.safetensors"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_there_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, made = tmp_path / "files", tmp_path / "made.safetensors"
    assert run(["export", TINYVL, "--format", name, "-o", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(folder / file) for file in FORMATS[name].files]
    assert "files do not hold:\n- the model that the file is for" in err
    assert run(["validate", str(folder), "tinyvl", "--format", name]) == 0
    assert "of the shape of tinyvl" in capsys.readouterr().out
    line = ["import", str(folder), "--format", name, "--model", "tinyvl", "-o", str(made)]
    assert run(line) == 0
    assert capsys.readouterr().err.startswith("the profile does not hold, or holds otherwise:\n- ")
    assert load_profile(made).grid == load_profile(TINYVL).grid
    assert run(["validate", str(made), "tinyvl"]) == 0
    assert run(line) == 2
    assert "already exists" in capsys.readouterr().err


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("mine")
    line = ["export", TINYVL, "--format", "duo", "-o", str(tmp_path)]
    assert run(line) == 2
    assert "already exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert run([*line, "--force"]) == 0
    assert json.loads((tmp_path / "config.json").read_text())["sink_size"] == 128


def test_the_default_folder_is_named_after_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(Path(TINYVL).absolute())
    monkeypatch.chdir(tmp_path)
    assert run(["export", source, "--format", "rtp"]) == 0
    assert (tmp_path / "tinyvl.rtp" / "headwise_config.json").is_file()


def test_files_of_another_model_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_profile().save(tmp_path / "other")
    assert run(["export", str(other), "--format", "sparsemm", "-o", str(tmp_path / "f")]) == 0
    capsys.readouterr()
    line = ["import", str(tmp_path / "f"), "--format", "sparsemm", "--model", "tinyvl"]
    assert run([*line, "-o", str(tmp_path / "made")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: expected 6 layers of 8 query heads; the file lacks 0-4")
    assert "another model" in err
    assert not (tmp_path / "made").exists()
    assert run(["validate", str(tmp_path / "f"), "tinyvl", "--format", "sparsemm"]) == 1


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", TINYVL, "--format", "kvzip"]) == 2
    assert "expected one of duo, sparsemm, rtp, lukv" in capsys.readouterr().err
    assert run(["validate", str(tmp_path), "--format", "duo"]) == 2
    assert "needs a MODEL" in capsys.readouterr().err
    files, made = str(tmp_path / "f"), str(tmp_path / "made")
    assert run(["export", TINYVL, "--format", "rtp", "-o", files]) == 0
    line = ["import", files, "--format", "rtp", "--model", "tinyvl", "-o", made, "--budget", "0.1"]
    assert run(line) == 2
    assert "its pattern says what heads keep" in capsys.readouterr().err


def test_a_budget_is_taken_where_there_are_curves(tmp_path: Path) -> None:
    assert run(["export", TINYVL, "--format", "lukv", "-o", str(tmp_path)]) == 0
    made = tmp_path / "made"
    line = ["import", str(tmp_path), "--format", "lukv", "--model", "tinyvl", "-o", str(made)]
    assert run([*line, "--budget", "20%"]) == 0
    assert load_profile(made).default_budget == 0.2
    assert load_profile(made).budget.mean() == pytest.approx(0.2, abs=2e-3)
