"""Files that are either wholly there or not there at all, also when a process is killed."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hkvprof.errors import HkvError, UsageError

_SUFFIX = ".hkvprof-part"
"""Ending of files that are being written; who writes one holds a lock on it (flock)."""
_SECONDS_BETWEEN_LOOKS = 0.5


def user_cache() -> Path:
    """$HKVPROF_CACHE, $XDG_CACHE_HOME/hkvprof or ~/.cache/hkvprof; not made here.

    Raises RuntimeError where there is no home.
    """
    own, shared = os.environ.get("HKVPROF_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path(shared or "~/.cache") / "hkvprof").expanduser()


def read_limited(path: Path, most: int) -> bytes:
    """The bytes of a file. Raises ValueError for more than `most`, OSError."""
    with path.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    return data


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raise UsageError if `path` exists and `force` is not set."""
    if (path.exists() or path.is_symlink()) and not force:
        raise UsageError(
            f"{path} already exists and nothing was written: give another path with -o, "
            "or --force to replace it"
        )


def writable(path: Path) -> bool:
    """Whether `path`, a folder, can be written or made: asked before long work."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file in the same folder and a rename.

    Whoever looks sees the old file or the new one, never a part, even after a crash: the data is on
    disk before the rename, the rename before this returns. What killed writers of `path` left is
    removed. Raises HkvError when the folder is missing or not writable or the disk is full; the
    temporary file is removed.
    """
    path = Path(path)
    with _writing(path, data) as temporary:
        os.replace(temporary, path)


def write_once(path: Path, data: bytes) -> bool:
    """As `write_atomically`, unless `path` exists: of several processes, one writes.

    Returns whether this one did. Raises HkvError, also on a file system without hard links.
    """
    path = Path(path)
    with _writing(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    return True


@contextmanager
def in_turn(path: Path, wait: Callable[[Iterator[None]], None]) -> Iterator[None]:
    """Within: of all processes that come here with the file `path`, this one alone.

    While another is within, `wait` gets an iterator that ends when it is not any more; so it is
    when it was killed. On a file system without locks nobody waits. Raises HkvError where the file
    cannot be opened.
    """
    try:
        stream = path.open("r+b")
    except OSError as error:
        raise HkvError(f"cannot open {path}: {error.strerror or error}") from error
    with stream:
        if not _takes_lock(stream):
            wait(_until_lock(stream))
        yield


def _takes_lock(stream: BinaryIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    return True


def _until_lock(stream: BinaryIO) -> Iterator[None]:
    """Once, when the lock is had."""
    while not _takes_lock(stream):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    yield


def is_part(path: Path) -> bool:
    """Whether `path` names a file that is being written, or that a killed writer left."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def remove_stale(folder: Path, name: str = "") -> None:
    """Remove what killed writers left in `folder` (of the file `name` alone, if given).

    A file whose writer lives is locked and stays.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if is_part(path) and path.name.startswith(f".{name}"):
            # A file that cannot be opened or locked may be in use: it stays.
            with suppress(OSError), path.open("r+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@contextmanager
def _writing(path: Path, data: bytes) -> Iterator[str]:
    """The name of a file beside `path` that holds `data` on disk; within, it gets its own name."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, f"{path.name}.")
        descriptor, temporary = _locked_file(path)
        with os.fdopen(descriptor, "wb") as stream:  # the lock ends with it
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            yield temporary
        _sync_folder(path.parent)
    except OSError as error:
        raise HkvError(
            f"cannot write {path}: {error.strerror or error}. Free some space or choose a "
            "writable folder with -o; an older file at that path is untouched"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _locked_file(path: Path) -> tuple[int, str]:
    """Descriptor and name of a new temporary file for `path`, locked."""
    while True:
        descriptor, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX
        )
        with suppress(OSError):  # without locks nobody takes the file for stale either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)  # taken for stale before it was locked


def _sync_folder(folder: Path) -> None:
    """Bring a rename to disk. Some network file systems refuse; the file is whole in any case."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
