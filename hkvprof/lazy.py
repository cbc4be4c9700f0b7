"""What is loaded when first used: names of a package, and triton where there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

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
