"""Architectures that no adapter lists, and quantised weights of kinds that were not tested, must
have passed the doctor before they are used.

A record is a small JSON file per architecture, quantisation, config and versions in the user's
cache folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hkvprof.errors import ModelError
from hkvprof.models.adapter import ModelView
from hkvprof.models.passed import is_recorded, record, record_path, versions

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
