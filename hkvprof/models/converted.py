"""Checkpoint folders made once of something else, and kept in the cache folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from hkvprof.errors import ModelError
from hkvprof.files.atomic import user_cache

MARKER = "complete.json"
FORMAT = 2  # raise when the content of checkpoints changes: old folders are then made again
_STALE_SECONDS = 3600.0


def converted_folder(name: str, convert: Callable[[Path], None], cache_dir: Path | None) -> Path:
    """The folder `name` of the cache, filled by `convert` on the first call.

    `cache_dir` defaults to $HKVPROF_CACHE, $XDG_CACHE_HOME/hkvprof or ~/.cache/hkvprof. The folder
    appears under its name only when complete, so a killed conversion leaves nothing that would be
    used, and of two processes that convert at once the second adopts the first one's result.
    Raises ModelError where it cannot be written, and what `convert` raises.
    """
    root = user_cache() if cache_dir is None else cache_dir
    target = root / name
    if is_complete(target):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root, name)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
        try:
            convert(work)
            _mark(work)
            _publish(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"expected a writable cache folder at {root} with room for the unpacked weights, "
            f"found: {error}. Set HKVPROF_CACHE to another folder."
        ) from error
    return target


def is_complete(folder: Path) -> bool:
    """True when the marker, written last, is there and every file has the size it records."""
    try:
        record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = record["bytes"].items()
        same = (size == (folder / name).stat().st_size for name, size in sizes)
        return bool(record["format"] == FORMAT and all(same))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _mark(folder: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    record = {"format": FORMAT, "bytes": sizes}
    (folder / MARKER).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _remove_stale(root: Path, name: str) -> None:
    """Free the space of conversions that were killed more than an hour ago."""
    for folder in root.glob(f".{name}.*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _publish(work: Path, target: Path) -> None:
    """Move the finished folder to its name, unless another process was first."""
    if target.exists() and not is_complete(target):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        with suppress(FileNotFoundError):  # another process may have moved it first
            os.replace(target, aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.replace(work, target)
    except OSError:
        if not is_complete(target):
            raise
