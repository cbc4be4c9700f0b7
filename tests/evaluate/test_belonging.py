"""An evaluation belongs to a profile's content, whatever a certificate adds to the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hkvprof.cli import run
from hkvprof.errors import UsageError
from hkvprof.evaluate.belonging import check_belongs, keep_content
from tests.profiles import make_profile, with_certificate
from tests.report.evaluations import write_evaluation


def test_the_file_or_its_content(tmp_path: Path) -> None:
    profile = make_profile()
    file, folder = profile.save(tmp_path / "p.safetensors"), tmp_path / "out"
    write_evaluation(folder, file)
    check_belongs(folder, file, profile)
    certified = with_certificate(profile)
    certified.save(file)
    with pytest.raises(UsageError, match="of another profile"):
        check_belongs(folder, file, certified)  # nothing tells its content
    keep_content(folder, profile)
    check_belongs(folder, file, certified)
    other = replace(profile, loss=profile.loss / 2)
    with pytest.raises(UsageError, match="of another profile"):
        check_belongs(folder, other.save(tmp_path / "q.safetensors"), other)
    (folder / "profile.json").write_text("[]")
    with pytest.raises(UsageError, match="of another profile"):
        check_belongs(folder, file, certified)


def test_the_report_refuses_another_s_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_profile().save(tmp_path / "p.safetensors")
    other = make_profile("uniform").save(tmp_path / "q.safetensors")
    write_evaluation(tmp_path / "out", file)
    line = ["--eval", str(tmp_path / "out"), "-o", str(tmp_path / "report.html")]
    assert run(["report", str(other), *line]) == 2
    assert "holds an evaluation of another profile than" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    assert run(["report", str(file), *line]) == 0
    assert "<h2>Evaluation</h2>" in (tmp_path / "report.html").read_text()
