"""Whether the folder of an evaluation is of a profile: by the file, or by what decides in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hkvprof.errors import UsageError
from hkvprof.evaluate.journal import read_conditions
from hkvprof.files import strict_json
from hkvprof.files.atomic import read_limited, write_atomically
from hkvprof.profile.record import Profile

FILE = "profile.json"
_MOST_BYTES = 2**16


def keep_content(folder: Path, profile: Profile) -> None:
    """Note which content was evaluated: a certificate in the file's provenance changes the file,
    and nothing that it decides. Raises HkvError."""
    told = {"content": profile.content_digest}
    write_atomically(folder / FILE, (json.dumps(told) + "\n").encode())


def check_belongs(folder: Path, file: Path, profile: Profile) -> None:
    """Raise UsageError for a folder of another profile or of an engine's own plan, and for none of
    an evaluation."""
    known = read_conditions(folder)
    if "engine" in known:
        raise UsageError(
            f"{folder} holds an evaluation inside {known['engine']}, which plans anew: give --eval "
            "a folder of `hkvprof eval` without --engine"
        )
    if known.get("profile") == file_digest(file) or _content(folder) == profile.content_digest:
        return
    raise UsageError(
        f"{folder} holds an evaluation of another profile than {file}: give --eval the folder that "
        f"`hkvprof eval --profile {file} -o DIR` wrote"
    )


def file_digest(file: Path) -> str:
    """SHA-256 of a profile's file. Raises UsageError where it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}") from None


def _content(folder: Path) -> str:
    path = folder / FILE
    try:
        told = strict_json.loads(read_limited(path, _MOST_BYTES).decode("utf-8"))
        return str(told["content"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # folders of earlier versions have none
