"""The releases of transformers that hkvprof was tested with, and which others passed a check here.

A record is a small JSON file per set of versions in the user's cache folder, as of `approval`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

import hkvprof
from hkvprof.errors import HkvError
from hkvprof.files import read_limited, user_cache, write_atomically

TESTED = ("5.16.0", "5.23.0", "5.24.0")
"""The oldest, the pinned and the newest: `make test` runs on each (constraints*.txt)."""
_LONGEST = 4096
"""Bytes that a record may have."""


def is_tested() -> bool:
    """Whether the transformers that is imported is one of `TESTED`."""
    return str(transformers.__version__) in TESTED


def has_passed() -> bool:
    """Whether these versions have passed the self-check here; False where that cannot be read."""
    try:
        return bool(json.loads(read_limited(_path(), _LONGEST)) == _record())
    except (OSError, ValueError, RuntimeError, RecursionError):
        return False


def remember() -> None:
    """Record that these versions passed. Where nothing can be written, the check runs again."""
    try:
        write_atomically(_path(), json.dumps(_record(), indent=2).encode() + b"\n")
    except (HkvError, OSError, RuntimeError):
        return


def _record() -> dict[str, Any]:
    versions = {
        "hkvprof": hkvprof.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }
    return {"format": 1, "passed": versions}


def _path() -> Path:
    digest = hashlib.sha256(json.dumps(_record()).encode()).hexdigest()[:24]
    return user_cache().absolute() / "selfcheck" / f"{digest}.json"
