"""On a release of transformers that hkvprof was not tested with, a check before anything is hooked.

Everything here rests on parts of transformers that promise no stability: names of arguments, what a
cache is asked, how attention is called. A release that changes them would make results silently
wrong; the check finds it on tiny random models, in a second or two, and names it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import transformers

from hkvprof.errors import HkvWarning, ModelError
from hkvprof.models.approval import TESTED, has_passed, is_tested, remember

OVERRIDE = "HKVPROF_UNTESTED"
"""Set to 1: what the check finds is a warning."""
_CHECKING: ContextVar[bool] = ContextVar("hkvprof_checking", default=False)
_LOCK = threading.Lock()


@dataclass
class _Outcome:
    """What this process's check found, empty where all is well; None: it has not run yet."""

    found: str | None = None
    is_told: bool = False


_OUTCOME = _Outcome()


def require_tested_seam(apply: Callable[..., Any]) -> None:
    """Raise ModelError where this release of transformers is untested and fails the check.

    `apply` is hkvprof's own; what the check applies is not checked again. The check runs once in a
    process, and once on a machine for the same versions of hkvprof, transformers and torch
    (models.approval). With HKVPROF_UNTESTED=1 a failure warns (HkvWarning, once).
    """
    if is_tested() or _CHECKING.get():
        return
    with _LOCK:
        if _OUTCOME.found is None:
            _OUTCOME.found = "" if has_passed() else _check(apply)
    if not _OUTCOME.found:
        return
    problem = (
        f"transformers {transformers.__version__} is none of the releases that hkvprof was tested "
        f"with ({', '.join(TESTED)}), and what hkvprof relies on has changed: {_OUTCOME.found}. "
        f"Results would be wrong: install a newer hkvprof, or transformers=={TESTED[-1]}"
    )
    if os.environ.get(OVERRIDE) != "1":
        raise ModelError(f"{problem} ({OVERRIDE}=1 goes on all the same)")
    if not _OUTCOME.is_told:
        _OUTCOME.is_told = True
        warnings.warn(f"{problem}. {OVERRIDE}=1: going on all the same", HkvWarning, stacklevel=3)


def _check(apply: Callable[..., Any]) -> str:
    from hkvprof.runtime.selfcheck.examine import examine

    token = _CHECKING.set(True)
    try:
        found = examine(apply)
    finally:
        _CHECKING.reset(token)
    if not found:
        remember()
    return found
