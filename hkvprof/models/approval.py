"""Architectures that no adapter lists, and quantised weights of kinds that were not tested, must
have passed the doctor before they are used.

A record is a small JSON file per architecture, quantisation, config and versions in the user's
cache folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers

import hkvprof
from hkvprof.errors import ModelError
from hkvprof.files import user_cache, write_atomically
from hkvprof.models.adapter import ModelView

_FORMAT = 1
_LONGEST = 4096
"""Bytes that a record may have."""
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
    data = json.dumps({"format": _FORMAT, "passed": _key(view)}, indent=2, sort_keys=True)
    write_atomically(path, data.encode() + b"\n")
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
        with path.open("rb") as file:
            record = json.loads(file.read(_LONGEST))
    except FileNotFoundError:
        return "it has not passed the doctor with this config and these versions"
    except (OSError, ValueError, RecursionError) as error:
        return f"its record {path} cannot be read ({str(error).splitlines()[0]})"
    if record != {"format": _FORMAT, "passed": _key(view)}:
        return f"its record {path} is not of this model and these versions"
    return ""


def _key(view: ModelView) -> dict[str, Any]:
    """What an approval is bound to."""
    quantisation = {"quantisation": view.untested} if view.untested else {}
    return {
        "architecture": view.fingerprint.architecture,
        **quantisation,
        "config_hash": view.fingerprint.config_hash,
        "hkvprof": hkvprof.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def _path(view: ModelView) -> Path:
    digest = hashlib.sha256(json.dumps(_key(view), sort_keys=True).encode()).hexdigest()[:24]
    try:
        return user_cache().absolute() / "doctor" / f"{digest}.json"
    except RuntimeError as error:
        raise ModelError(
            f"there is no cache folder for the doctor's records ({error}): set HKVPROF_CACHE to a "
            "folder of yours"
        ) from error
