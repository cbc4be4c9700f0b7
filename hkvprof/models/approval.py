"""Architectures that no adapter lists, and quantised weights of kinds that were not tested, must
have passed the doctor before they are used.

A record is a small JSON file per architecture, quantisation, config and versions in the user's
cache folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers

import hkvprof
from hkvprof.errors import HkvError, ModelError
from hkvprof.files.atomic import read_limited, user_cache, write_atomically
from hkvprof.models.adapter import ModelView

_FORMAT = 1
_LONGEST = 4096
"""Bytes that a record may have."""


def versions() -> dict[str, str]:
    """The versions of hkvprof, torch and transformers, to which every record is bound."""
    return {
        "hkvprof": hkvprof.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def record_path(folder: str, bound_to: Mapping[str, Any]) -> Path:
    """The file of the record bound to these facts. Raises RuntimeError without a cache folder."""
    digest = hashlib.sha256(json.dumps(bound_to, sort_keys=True).encode()).hexdigest()[:24]
    return user_cache().absolute() / folder / f"{digest}.json"


def is_recorded(path: Path, bound_to: Mapping[str, Any]) -> bool:
    """Whether the file is a record of this. Raises OSError, ValueError, RecursionError where it
    cannot be read."""
    return bool(json.loads(read_limited(path, _LONGEST)) == _record(bound_to))


def record(path: Path, bound_to: Mapping[str, Any]) -> None:
    """Write the record of what passed. Raises HkvError, OSError where it cannot be written."""
    text = json.dumps(_record(bound_to), indent=2, sort_keys=True)
    write_atomically(path, text.encode() + b"\n")


def _record(bound_to: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, "passed": dict(bound_to)}


_FOLDER = "selfcheck"
TESTED = ("5.16.0", "5.23.0", "5.24.0")
"""The oldest, the pinned and the newest: `make test` runs on each (constraints*.txt)."""


def is_tested() -> bool:
    """Whether the transformers that is imported is one of `TESTED`."""
    return str(transformers.__version__) in TESTED


def has_passed() -> bool:
    """Whether these versions have passed the self-check here; False where that cannot be read."""
    try:
        return is_recorded(record_path(_FOLDER, versions()), versions())
    except (OSError, ValueError, RuntimeError, RecursionError):
        return False


def remember() -> None:
    """Record that these versions passed. Where nothing can be written, the check runs again."""
    try:
        record(record_path(_FOLDER, versions()), versions())
    except (HkvError, OSError, RuntimeError):
        return


_EXAMINED: ContextVar[bool] = ContextVar("examined", default=False)


def require_approval(view: ModelView) -> None:
    """Raise ModelError for a view that is unproven and has not passed the doctor here."""
    if not view.unproven or _EXAMINED.get():
        return
    problem = _problem(view)
    if problem:
        raise ModelError(
            f"{view.fingerprint.architecture}: {view.unproven}, and {problem}; run "
            "`hkvprof doctor MODEL` first"
        )


def approve(view: ModelView) -> Path:
    """Record that the doctor passed this model here. Raises HkvError when it cannot be written."""
    path = _path(view)
    record(path, _key(view))
    return path


def withdraw(view: ModelView) -> None:
    """Remove the record of a model that failed."""
    _path(view).unlink(missing_ok=True)


@contextmanager
def under_examination() -> Iterator[None]:
    """Within (this thread), no approval is asked for: the doctor must be able to try."""
    token = _EXAMINED.set(True)
    try:
        yield
    finally:
        _EXAMINED.reset(token)


def _problem(view: ModelView) -> str:
    """Why there is no approval; empty where there is one."""
    path = _path(view)
    try:
        recorded = is_recorded(path, _key(view))
    except FileNotFoundError:
        return "it has not passed the doctor with this config and these versions"
    except (OSError, ValueError, RecursionError) as error:
        return f"its record {path} cannot be read ({str(error).splitlines()[0]})"
    return "" if recorded else f"its record {path} is not of this model and these versions"


def _key(view: ModelView) -> dict[str, Any]:
    """What an approval is bound to."""
    quantisation = {"quantisation": view.untested} if view.untested else {}
    return {
        "architecture": view.fingerprint.architecture,
        **quantisation,
        "config_hash": view.fingerprint.config_hash,
        **versions(),
    }


def _path(view: ModelView) -> Path:
    try:
        return record_path("doctor", _key(view))
    except RuntimeError as error:
        raise ModelError(
            f"there is no cache folder for the doctor's records ({error}): set HKVPROF_CACHE to a "
            "folder of yours"
        ) from error
