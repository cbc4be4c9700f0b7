"""Checkpoints in the cache folder: made once, atomically, and again when damaged."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from hkvprof.errors import ModelError
from hkvprof.files.atomic import user_cache
from hkvprof.models import converted
from hkvprof.models.converted import converted_folder, is_complete

NAME = "gguf-0123456789abcdef"


def write(folder: Path) -> None:
    """A conversion that writes one small file."""
    (folder / "weights").write_bytes(bytes(1000))


def test_second_call_reuses_the_folder(tmp_path: Path) -> None:
    folder = converted_folder(NAME, write, tmp_path / "cache")
    again = converted_folder(NAME, lambda _: pytest.fail("converted twice"), tmp_path / "cache")
    assert again == folder == tmp_path / "cache" / NAME
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [NAME]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_conversion_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with pytest.raises((ModelError, KeyboardInterrupt)) as caught:
        converted_folder(NAME, fail, tmp_path)
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        assert "HKVPROF_CACHE" in str(caught.value)


def test_damaged_folder_is_made_again(tmp_path: Path) -> None:
    folder = converted_folder(NAME, write, tmp_path)
    for damage in (b"", b"cut"):
        (folder / "weights").write_bytes(damage)
        assert not is_complete(folder)
        assert is_complete(converted_folder(NAME, write, tmp_path))
    now = f'{{"format": {converted.FORMAT}, "bytes": 3}}'
    for text in ("", "[]", "{}", '{"format": 0, "bytes": {}}', now):
        (folder / converted.MARKER).write_text(text, encoding="utf-8")
        assert not is_complete(folder)
    assert [entry.name for entry in tmp_path.iterdir()] == [NAME]


def test_the_slower_of_two_processes_adopts_the_first_result(tmp_path: Path) -> None:
    def first(folder: Path) -> None:
        write(folder)
        (folder / "by-the-first").touch()

    def race(folder: Path) -> None:
        write(folder)
        converted_folder(NAME, first, tmp_path)

    assert (converted_folder(NAME, race, tmp_path) / "by-the-first").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == [NAME]


def test_remains_of_a_killed_conversion_are_ignored_then_removed(tmp_path: Path) -> None:
    for age, suffix in ((7200, "old"), (0, "new")):
        killed = tmp_path / f".{NAME}.{suffix}"
        killed.mkdir()
        os.utime(killed, (time.time() - age,) * 2)
    converted_folder(NAME, write, tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f".{NAME}.new", NAME]


def test_the_marker_tells_all_files(tmp_path: Path) -> None:
    folder = converted_folder(NAME, write, tmp_path)
    assert json.loads((folder / converted.MARKER).read_text())["bytes"] == {"weights": 1000}


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HKVPROF_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache() == tmp_path / ".cache" / "hkvprof"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert user_cache() == Path("/x/hkvprof")
    monkeypatch.setenv("HKVPROF_CACHE", "~/mine")
    assert user_cache() == tmp_path / "mine"
