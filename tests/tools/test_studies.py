"""Studies change constants of the product by name: the names are there, and the changes count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hkvprof.calibration.fitted import FittedTables
from hkvprof.calibration.rows import RowFolder
from hkvprof.heads import EVEN, Rules
from tests.calibration.made_rows import CONDITIONS, GRID
from tests.calibration.test_margin import noisy_rows
from tests.profiles import index_tables
from tools.studies import study_halves, study_planning, study_tinyvl


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("studies") / "rows"
    folder = RowFolder(path, CONDITIONS)
    folder.keep_tables(FittedTables(index_tables(GRID)), "these")
    for row in noisy_rows(12, 0.5, 0.9):
        folder.add(row)
    return path


def test_variants_of_planning_differ_as_they_say(rows: Path) -> None:
    made = {name: study_planning.decided(rows, name) for name in study_planning.VARIANTS}
    assert made["own75"].rules == Rules(EVEN) == Rules()
    own, pooled = made["own"].loss.astype(np.float64), made["pooled3"].loss.astype(np.float64)
    possible = own < 1e30
    mean = np.where(possible, own, np.nan)
    mean = np.nanmean(mean, axis=(2, 3), keepdims=True)
    added = np.broadcast_to(3 * mean, own.shape)[possible]
    np.testing.assert_allclose((pooled - own)[possible], added, rtol=1e-4, atol=1e-6)
    assert (pooled[~possible] >= 1e30).all()
    assert not np.allclose(made["fourth"].loss, made["own"].loss)


@pytest.mark.parametrize("name", study_tinyvl.VARIANTS)
def test_constants_that_variants_change_are_there(name: str) -> None:
    with study_tinyvl._constants(**study_tinyvl.VARIANTS[name].constants):
        pass


def test_halves_are_judged_by_the_others(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["study_halves", str(rows), "--samples", "4", "--repeats", "1"])
    study_halves.main()
    assert "fourth roots" in capsys.readouterr().out
