"""Without a C++ compiler the suite runs on the torch kernels, and says so.

Without a CUDA device the Triton kernels are tested in Triton's interpreter, which must be chosen
before triton is imported.

What transformers only logs as deprecated fails a test, as a warning does.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings

import torch

from hkvprof.runtime.kernels.build import BuildError, find_compiler

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # or triton 3.9 warns when it compiles
if importlib.util.find_spec("triton") is None:
    TRITON = "not tested (triton is not installed)"
elif torch.cuda.is_available():
    TRITON = "on the CUDA device, with `-m gpu`"
else:
    os.environ["TRITON_INTERPRET"] = "1"
    TRITON = "in the interpreter"

try:
    find_compiler()
except BuildError as error:
    os.environ.setdefault("HKVPROF_NATIVE", "0")
    REASON = str(error)
else:
    REASON = ""


class Deprecations(logging.Handler):
    """Turns what is logged as deprecated into a warning."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            warnings.warn(record.getMessage(), FutureWarning, stacklevel=2)


logging.getLogger("transformers").addHandler(Deprecations(logging.WARNING))


def pytest_report_header() -> list[str]:
    """The kernels that the tests run on."""
    lines = [f"hkvprof Triton kernels: {TRITON}"]
    return [*lines, f"hkvprof kernels: torch only ({REASON})"] if REASON else lines
