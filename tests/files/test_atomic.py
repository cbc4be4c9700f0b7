"""Atomic writes: the old file, or the new one, and never a leftover."""

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from hkvprof.errors import HkvError, UsageError
from hkvprof.files.atomic import (
    is_part,
    refuse_overwrite,
    remove_stale,
    write_atomically,
    write_once,
)


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EACCES)]
)
def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: OSError
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise error

    if step == "write":
        real = os.fdopen

        def fdopen(descriptor: int, mode: str):  # the stream takes half, then the disk is full
            stream = real(descriptor, mode, buffering=0)

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *_: object) -> None:
                    stream.close()

                def write(self, data: bytes) -> None:
                    stream.write(data[: len(data) // 2])
                    raise error

            return Full()

        monkeypatch.setattr(os, "fdopen", fdopen)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(HkvError, match=f"cannot write .*file: {error.strerror}"):
        write_atomically(path, b"new content")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(HkvError, match="cannot write"):
            write_atomically(path, b"data")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_refuse_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "file"
    refuse_overwrite(path, force=False)
    path.touch()
    refuse_overwrite(path, force=True)
    with pytest.raises(UsageError, match="--force"):
        refuse_overwrite(path, force=False)


def test_a_dangling_link_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--force"):
        refuse_overwrite(path, force=False)


# -- several processes, killed ones among them ----------------------------------------------------


def part_of(path: Path, locked: bool) -> Path:
    """A file as a writer of `path` leaves it in the middle; `locked` as long as that lives."""
    part = path.with_name(f".{path.name}.abc.hkvprof-part")
    part.write_bytes(b"half")
    if locked:
        stream = part.open("rb")
        fcntl.flock(stream, fcntl.LOCK_EX)
        ALIVE.append(stream)
    return part


ALIVE: list[BinaryIO] = []


@pytest.fixture(autouse=True)
def _end_writers() -> Iterator[None]:
    yield
    while ALIVE:
        ALIVE.pop().close()


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    mine, theirs, alive = part_of(path, False), part_of(other, False), part_of(tmp_path / "x", True)
    (tmp_path / ".file.swp").touch()
    write_atomically(path, b"data")
    assert not mine.exists()
    assert theirs.exists()
    remove_stale(tmp_path)
    assert not theirs.exists()
    assert alive.exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", ".file.swp", alive.name}
    assert [is_part(entry) for entry in (mine, path, tmp_path / ".file.swp")] == [
        True,
        False,
        False,
    ]
    remove_stale(tmp_path / "nowhere")


def test_a_living_writer_keeps_its_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    alive = part_of(path, True)
    write_atomically(path, b"data")
    assert alive.read_bytes() == b"half"
    ALIVE.pop().close()
    write_atomically(path, b"data")
    assert not alive.exists()


def test_a_part_taken_for_stale_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkstemp, []

    def taken_away(**options: Any) -> tuple[int, str]:
        found = make(**options)
        made.append(found[1])
        if len(made) == 1:
            Path(found[1]).unlink()
        return found

    monkeypatch.setattr(tempfile, "mkstemp", taken_away)
    write_atomically(tmp_path / "file", b"data")
    assert len(made) == 2
    assert (tmp_path / "file").read_bytes() == b"data"


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([number]) * 100_000 for number in range(8)]

    def write(data: bytes) -> None:
        for _ in range(20):
            write_atomically(path, data)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, contents))
    assert path.read_bytes() in contents
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_of_several_processes_one_writes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda number: write_once(path, bytes([number])), range(8)))
    assert wrote.count(True) == 1
    assert path.read_bytes() == bytes([wrote.index(True)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    (tmp_path / "folder").mkdir()
    assert not write_once(tmp_path / "folder", b"")


def test_data_is_on_disk_before_the_rename_and_the_rename_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power failure leaves cannot be tested; the order of the calls can."""
    path, done = tmp_path / "file", []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        done.append(f"{kind} synced with {len(list(tmp_path.glob('file')))} in place")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    write_atomically(path, b"data")
    assert done == ["file synced with 0 in place", "renamed", "folder synced with 1 in place"]
