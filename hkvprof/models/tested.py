"""The releases of transformers that hkvprof was tested with, and which others passed a check here.

A record per set of versions says that they did (models.passed).
"""

from __future__ import annotations

import transformers

from hkvprof.errors import HkvError
from hkvprof.models.passed import is_recorded, record, record_path, versions

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
