"""Without a C++ compiler the suite runs on the torch kernels, and says so."""

from __future__ import annotations

import os

from hkvprof.runtime.kernels.build import BuildError, find_compiler

try:
    find_compiler()
except BuildError as error:
    os.environ.setdefault("HKVPROF_NATIVE", "0")
    REASON = str(error)
else:
    REASON = ""


def pytest_report_header() -> list[str]:
    """The kernels that the tests run on."""
    return [f"hkvprof kernels: torch only ({REASON})"] if REASON else []
