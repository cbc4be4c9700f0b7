"""`hkvprof merge`: options of planning reach the profile, are shown, and refused where idle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hkvprof import load_profile
from hkvprof.calibration.fitted import FittedTables
from hkvprof.calibration.rows import RowFolder
from hkvprof.cli import run
from hkvprof.profile.planning import Rules
from tests.calibration.made_rows import CONDITIONS, GRID
from tests.calibration.test_margin import noisy_rows
from tests.profiles import index_tables

Merge = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static is a little better in 12 noisy samples."""
    path = tmp_path_factory.mktemp("merge") / "rows"
    folder = RowFolder(path, CONDITIONS)
    folder.keep_tables(FittedTables(index_tables(GRID)), "these")
    for row in noisy_rows(12, 0.5, 0.9):
        folder.add(row)
    return path


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str]) -> Merge:
    """Exit code and all output of `hkvprof merge`."""

    def call(*arguments: object) -> tuple[int, str]:
        code = run(["merge", *map(str, arguments)])
        shown = capsys.readouterr()
        return code, " ".join((shown.out + shown.err).split())

    return call


def test_options_reach_the_profile_and_doubts_are_shown(
    measured: Path, tmp_path: Path, merge: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.safetensors"
    code, text = merge(measured, "-o", path)
    assert code == 0
    profile = load_profile(path)
    assert profile.rules == Rules()
    assert profile.provenance["risk"] == "mean"
    count = profile.provenance["conservative"]
    assert count > 0
    line = f"{count} of {GRID.total} heads are dynamic because samples do not tell (95%)"
    assert line in text
    assert run(["inspect", str(path)]) == 0
    assert line in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--theta", "0.8"], "theta belong to recipe 'paper'"),
        (["--even", "0.5"], "--even is gone: three quarters of a budget"),
        (["--transfer-weight", "-1"], "--transfer-weight is gone: what a step reads"),
    ],
)
def test_numbers_out_of_range_write_nothing(
    measured: Path, tmp_path: Path, merge: Merge, options: list[str], words: str
) -> None:
    path = tmp_path / "p.safetensors"
    code, text = merge(measured, "-o", path, *options)
    assert code == 2
    assert words in text
    assert not path.exists()
