"""Where a dataset is: folders, files and links."""

from __future__ import annotations

from pathlib import Path

import pytest

from hkvprof.errors import UsageError
from hkvprof.evaluate.datasets.layouts import load_layout
from tests.evaluate.datasets.disk import docvqa


def test_a_relative_path_and_a_link_to_the_dataset_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docvqa().write(tmp_path / "data")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert load_layout("docvqa", "link").samples == load_layout("docvqa", "data").samples


@pytest.mark.parametrize("path", ["", "nowhere", "~nobody/x", "a\0b", "x" * 5000])
def test_paths_that_lead_nowhere_are_wrong_usage(path: str) -> None:
    with pytest.raises(UsageError, match="no dataset at"):
        load_layout("docvqa", path)
