"""The libraries of native kernels that this process has opened, and their C interface."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import warnings
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from hkvprof.runtime.kernels import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types, as HKV_TYPE numbers them."""


class AttendArgs(ctypes.Structure):
    """As in csrc/attend.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("key", "value", "query", "out")),
        *((name, POINTER(c_int64)) for name in ("offsets", "lengths")),
        ("segments", c_int64),
        *((name, c_int32) for name in ("dim", "threads")),
        ("scaling", c_float),
    )


class Head(ctypes.Structure):
    """As in csrc/retrieve.h."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "segment", "items", "hot", "chunk", "hot_start")),
        *((name, c_int64) for name in ("codes", "channels", "items_per_group", "rerank")),
        *((name, c_void_p) for name in ("first", "second", "projection", "codebook")),
        *((name, c_void_p) for name in ("subspaces", "slots", "hot_score", "host", "scale")),
        ("score", c_void_p),
    )


class RetrieveArgs(ctypes.Structure):
    """As in csrc/retrieve.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("key", "value", "query")),
        ("heads", POINTER(Head)),
        ("fetched", c_void_p),
        ("count", c_int64),
        *((name, c_int32) for name in ("dim", "threads", "successors")),
        *((name, c_float) for name in ("scaling", "smoothing")),
    )


class EncodeArgs(ctypes.Structure):
    """As in csrc/encode.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("projected", "codebook", "subspaces", "out")),
        *((name, c_int64) for name in ("tokens", "channels", "codes")),
        ("threads", c_int32),
    )


class _State:
    """Libraries of this process by (type, group), and why there are none."""

    def __init__(self) -> None:
        self.libraries: dict[tuple[int, int], ctypes.CDLL | None] = {}
        self.refused = ""
        self.notes: dict[str, None] = {}
        self.openmp = ""
        self.lock = threading.Lock()


STATE = _State()


def switched_off() -> str:
    """Why native kernels are not even tried, or an empty string."""
    if os.environ.get("HKVPROF_NATIVE") == "0":
        return "HKVPROF_NATIVE=0"
    if not sys.platform.startswith("linux") or sys.byteorder != "little":
        return f"native kernels are for Linux, little endian; this is {sys.platform}"
    return ""


def status() -> str:
    """One line about this process."""
    off = switched_off() or STATE.refused
    if off:
        return f"torch: {off}"
    loaded = sorted(group for (_, group), library in list(STATE.libraries.items()) if library)
    if not loaded:
        return "native: not compiled yet"
    line = f"native: query heads per KV head {', '.join(map(str, loaded))}; {STATE.openmp}"
    return "; ".join([line, *list(STATE.notes)])


def library(dtype: torch.dtype, group: int) -> ctypes.CDLL | None:
    """The library for this element type and group; None, after one warning, if it cannot be had."""
    if switched_off():
        return None
    key = (DTYPES[dtype], group)
    if key in STATE.libraries:
        return STATE.libraries[key]
    with STATE.lock:
        if key not in STATE.libraries:
            STATE.libraries[key] = None if STATE.refused else _open(*key)
    return STATE.libraries[key]


def opened(dtype: torch.dtype | None = None) -> ctypes.CDLL | None:
    """Any library, or any for this element type, that this process has opened already."""
    for (kind, _), found in STATE.libraries.copy().items():  # other threads may open one now
        if found is not None and (dtype is None or kind == DTYPES[dtype]):
            return found
    return None


def _open(kind: int, group: int) -> ctypes.CDLL | None:
    try:
        return _loaded((f"HKV_TYPE={kind}", f"HKV_GROUP={group}"))
    except build.BuildError as error:
        STATE.refused = str(error)
        warnings.warn(
            "hkvprof: decoding with compressed caches is slower than it could be: the native CPU "
            f"kernels are not used because {error}. HKVPROF_NATIVE=0 silences this",
            stacklevel=2,
        )
        return None


def _loaded(defines: tuple[str, ...]) -> ctypes.CDLL:
    """The library, compiled once more if what the cache has does not load. Raises BuildError."""
    for anew in (False, True):
        try:
            with build.library(defines, anew) as name:
                return _bound(ctypes.CDLL(name))
        except (OSError, AttributeError) as error:  # of another machine, or of an odd compiler
            reason = str(error)
    build.discard(defines)
    raise build.BuildError(f"what the compiler makes cannot be loaded ({reason})")


def _bound(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions. Raises AttributeError where one is missing."""
    loaded.hkv_init.argtypes = (c_void_p, c_void_p)
    loaded.hkv_init.restype = None
    loaded.hkv_attend.argtypes = (POINTER(AttendArgs),)
    loaded.hkv_retrieve.argtypes = (POINTER(RetrieveArgs), ctypes.c_int)
    loaded.hkv_encode.argtypes = (POINTER(EncodeArgs),)
    entries, STATE.openmp = _openmp()
    loaded.hkv_init(*entries)
    return loaded


def _openmp() -> tuple[tuple[int | None, int | None], str]:
    """GOMP_parallel and GOMP_barrier of the OpenMP runtime that torch has loaded.

    Sharing it avoids a second pool of threads that spins against torch's.
    """
    pattern = re.compile(r"(/\S*/lib(?:gomp|iomp5|omp)[^/]*\.so[^/\s]*)$", re.MULTILINE)
    try:
        paths = dict.fromkeys(pattern.findall(Path("/proc/self/maps").read_text()))
    except OSError:
        paths = {}
    for path in sorted(paths, key=lambda path: "torch" not in path):
        try:
            runtime = ctypes.CDLL(path)
            entries = (_address(runtime.GOMP_parallel), _address(runtime.GOMP_barrier))
        except (OSError, AttributeError):
            continue
        return entries, f"threads of {Path(path).name}"
    return (None, None), "one thread: torch's OpenMP runtime was not found"


def _address(function: Any) -> int | None:
    return ctypes.cast(function, c_void_p).value
