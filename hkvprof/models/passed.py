"""Records of what has passed a check on this machine, bound to the versions that it passed with.

A record is a small JSON file in the user's cache folder, named by a digest of what it is bound to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import hkvprof
from hkvprof.files import read_limited, user_cache, write_atomically

_FORMAT = 1
_LONGEST = 4096
"""Bytes that a record may have."""


def versions() -> dict[str, str]:
    """What every record is bound to."""
    return {
        "hkvprof": hkvprof.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def record_path(folder: str, bound_to: Mapping[str, Any]) -> Path:
    """Where the record is. Raises RuntimeError where the user has no cache folder."""
    digest = hashlib.sha256(json.dumps(bound_to, sort_keys=True).encode()).hexdigest()[:24]
    return user_cache().absolute() / folder / f"{digest}.json"


def is_recorded(path: Path, bound_to: Mapping[str, Any]) -> bool:
    """Whether the file is a record of this. Raises OSError, ValueError, RecursionError where it
    cannot be read."""
    return bool(json.loads(read_limited(path, _LONGEST)) == _record(bound_to))


def record(path: Path, bound_to: Mapping[str, Any]) -> None:
    """Write the record. Raises HkvError, OSError where it cannot be written."""
    text = json.dumps(_record(bound_to), indent=2, sort_keys=True)
    write_atomically(path, text.encode() + b"\n")


def _record(bound_to: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, "passed": dict(bound_to)}
