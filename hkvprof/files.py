"""Files that are either wholly there or not there at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hkvprof.errors import HkvError, UsageError


def user_cache() -> Path:
    """$HKVPROF_CACHE, $XDG_CACHE_HOME/hkvprof or ~/.cache/hkvprof; not made here.

    Raises RuntimeError where there is no home.
    """
    own, shared = os.environ.get("HKVPROF_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path(shared or "~/.cache") / "hkvprof").expanduser()


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raise UsageError if `path` exists and `force` is not set."""
    if (path.exists() or path.is_symlink()) and not force:
        raise UsageError(
            f"{path} already exists and nothing was written: give another path with -o, "
            "or --force to replace it"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file in the same folder and a rename.

    Whoever looks sees the old file or the new one, never a part. Raises HkvError when the folder
    is missing or not writable or the disk is full; the temporary file is removed.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise HkvError(
            f"cannot write {path}: {error.strerror or error}. Free some space or choose a "
            "writable folder with -o; an older file at that path is untouched"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
