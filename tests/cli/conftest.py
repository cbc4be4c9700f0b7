"""One warm process for all tests that run calibrations in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.runs import Bed


@pytest.fixture(scope="session")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """A tiny model, samples, and the warm process."""
    made = Bed(tmp_path_factory.mktemp("bed"))
    yield made
    made.warm.close()


@pytest.fixture(scope="session")
def whole(bed: Bed) -> bytes:
    """The profile of one uninterrupted run in one process."""
    path = bed.folder / "whole"
    ended = bed.warm.command(*bed.calibrate("-o", str(path)))
    assert ended.code == 0, ended.err
    return path.read_bytes()
