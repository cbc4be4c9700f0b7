"""The libraries of native kernels that this process has opened, and their C interface."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import warnings
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hkvprof.errors import CompressionError
from hkvprof.profile.costs import quantised_bytes
from hkvprof.runtime.kernels import build
from hkvprof.runtime.kernels.interface import DynamicSegment, QuantisedRows
from hkvprof.selection.index import KeyIndex, ProjectedIndex


def require(holds: bool, expected: str) -> None:
    """Raise CompressionError unless it holds."""
    if not holds:
        raise CompressionError(
            f"decode kernels: expected {expected}, found otherwise; nothing was read or written. "
            "This is a fault of hkvprof: please report it"
        )


def check_storage(key: Tensor, value: Tensor) -> None:
    """Flat storage [capacity, dim] of keys and values."""
    require(key.dim() == 2 and key.shape == value.shape, "keys and values of one shape")


def check_extents(starts: Sequence[int], lengths: Sequence[int], count: int, rows: int) -> None:
    """`count` segments within `rows` of storage."""
    require(len(starts) == len(lengths) == count, "a start and a length per segment")
    if count:
        require(min(starts) >= 0 <= min(lengths), "segments that begin and end in order")
        require(max(map(int.__add__, starts, lengths)) <= rows, "segments within the storage")


def check_quantised(held: QuantisedRows, dim: int, segments: int) -> None:
    """Tokens in fewer bits that lie within the bytes there are, of segments in order."""
    count = len(held.segments)
    told = {len(held.starts), len(held.counts), len(held.bits), len(held.mean)}
    require(told <= {count}, "a start, a count, bits and means per segment in fewer bits")
    require(held.mean.shape == (count, 2, dim), "means [segments, 2, dim]")
    require(held.rows.dim() == 1 and held.rows.dtype == torch.uint8, "rows as flat bytes")
    last = -1
    for place in zip(held.segments, held.starts, held.counts, held.bits, strict=True):
        segment, start, rows, bits = place
        require(last < segment < segments, "segments in order, each once")
        require(bits in (8, 4), "tokens of 8 or 4 bits")
        end = start + rows * quantised_bytes(bits, dim)
        require(start >= 0 <= rows and end <= len(held.rows), "rows within the bytes")
        in_order = rows == 0 or (start < held.eights) == (bits == 4)
        require(in_order, "rows in 4 bits before those in 8")
        last = segment


def check_head(head: DynamicSegment, key: Tensor, smoothing: float) -> None:
    """A dynamic head's own tensors, and its place in the storage `key` [capacity, dim]."""
    dim, host, slots = key.shape[1], head.host, head.slots
    require(head.segment >= 0 and head.chunk >= 1, "a segment and a chunk length")
    require(head.fresh >= 1, "at least one item that may become hot")
    require(head.rerank == 0 or (head.rerank > 0 and head.chunk == 1), "chunks of 1 to rerank")
    require(0 < head.hot <= head.items <= len(host), "hot items among those of the host")
    if head.coder is None:
        require(host.shape == (len(host), 2, head.chunk, dim), "host items [items, 2, chunk, dim]")
    if head.held is None:
        end = len(key) - head.hot * head.chunk
        require(0 <= head.hot_start <= end, "hot slots within the storage")
    _check_rows(head, dim)
    require(slots.dtype == torch.int32 and slots.dim() == 1, "slots as int32")
    require(slots.is_contiguous(), "slots without gaps")
    _check_floats(head, dim, smoothing)
    _check_index(head.index, head.items, dim)


def check_slots(head: DynamicSegment) -> None:
    """That hot slots hold items of the host; for kernels on the CPU, because it reads the slots."""
    low, high = head.slots.aminmax()
    require(0 <= int(low) <= int(high) < head.items, "slots that hold items of the host")


def _check_rows(head: DynamicSegment, dim: int) -> None:
    """Hot slots and host items that are rows of bytes."""
    held, coder, host = head.held, head.coder, head.host
    for one in (held, coder):
        if one is not None:
            require(one.format.bits in (8, 4) and one.format.dim == dim, "rows of 8 or 4 bits")
            require(one.mean.shape == (2, dim), "a mean [2, dim]")
    if held is not None:
        shape = (head.hot * head.chunk, held.format.row_bytes)
        require(held.rows.shape == shape, "a row per token of the hot slots")
        require(held.rows.dtype == torch.uint8 and held.rows.is_contiguous(), "rows without gaps")
    if coder is not None:
        require(host.shape[1:] == (head.chunk, coder.format.row_bytes), "a row per host token")
        require(host.dtype == torch.uint8, "host rows as bytes")
        require(held is None or held.format == coder.format, "rows of one format")


def _check_floats(head: DynamicSegment, dim: int, smoothing: float) -> None:
    score = head.hot_score
    require(smoothing == 0 or score is not None, "a score per hot slot to smooth with")
    if score is not None:
        plain = score.dtype == torch.float32 and score.is_contiguous()
        require(plain and score.shape == (head.hot,), "a float32 score per hot slot")


def _check_index(index: KeyIndex, items: int, dim: int) -> None:
    require(all(len(tensor) >= items for tensor in index.tensors()), "an index of every item")
    if not isinstance(index, ProjectedIndex):
        shapes = [tensor.shape[1:] == (dim,) for tensor in index.tensors()]
        require(all(shapes), "digests [items, dim]")
        return
    tables, codes = index.tables, index.codes
    channels = tables.codebook.shape[1]
    require(codes.dim() == 2 and codes.dtype == torch.uint8, "codes of one byte")
    require(tables.codebook.shape == (256, channels), "256 centroids per code")
    require(tables.query_projection.shape == (dim, channels), "a projection [dim, channels]")
    require(len(tables.subspaces) == codes.shape[1], "a subspace per code")
    check_subspaces(tables.subspaces, channels)
    if tables.bias is not None:
        _check_bias(index, items, dim)


def _check_bias(index: ProjectedIndex, items: int, dim: int) -> None:
    bias, positions = index.tables.bias, index.positions
    assert bias is not None
    require(positions is not None and positions.count >= items, "positions of every item")
    constants, places = bias.tensors()
    pairs = constants.shape[-1]
    require(constants.shape == places.shape == (3, pairs), "three rows of bias and of its places")
    require(2 * pairs <= dim and constants.dtype == torch.float32, "float32 bias of rotary pairs")
    require(places.dtype == torch.int32 and constants.is_contiguous(), "places as int32")
    told = None if positions is None else positions.told
    axes = 3 if told is None else len(told)
    if told is not None:
        plain = told.dtype == torch.int32 and told.stride(-1) == 1
        require(plain and told.shape[1] >= items, "int32 positions of every item")
    low, high = places[:2].aminmax() if pairs else (torch.zeros(1), torch.zeros(1))
    require(0 <= int(low) <= int(high) < dim, "channels within the head")
    if axes > 1 and pairs:
        require(0 <= int(places[2].min()) <= int(places[2].max()) < axes, "axes that are told")


def check_subspaces(subspaces: Sequence[tuple[int, int]], channels: int) -> None:
    """First channels, and those past the last, of every code."""
    within = (0 <= first <= end <= channels for first, end in subspaces)
    require(len(subspaces) > 0 and all(within), "subspaces within the channels")


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types, as HKV_TYPE numbers them."""


_PLACES = ("row_segments", "row_starts", "row_counts", "row_bits")


class AttendArgs(ctypes.Structure):
    """The arguments of hkv_attend, as in csrc/attend.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("key", "value", "query", "out")),
        *((name, POINTER(c_int64)) for name in ("offsets", "lengths")),
        ("segments", c_int64),
        *((name, c_void_p) for name in ("rows", "mean")),
        *((name, POINTER(c_int64)) for name in _PLACES),
        ("quantised", c_int64),
        *((name, c_int32) for name in ("dim", "threads")),
        ("scaling", c_float),
    )


class Bias(ctypes.Structure):
    """A bias that turns with positions (selection.rotary), as in csrc/waves.h."""

    _fields_ = (
        *((name, c_int64) for name in ("pairs", "first", "told_stride")),
        *((name, c_void_p) for name in ("constants", "places", "told")),
        ("stride", c_int64),
    )


class Head(ctypes.Structure):
    """A dynamic head (interface.DynamicSegment) as C++ sees it, in csrc/scores.h."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "segment", "items", "hot", "chunk", "hot_start")),
        *((name, c_int64) for name in ("codes", "channels", "rerank", "fresh", "bits")),
        *((name, c_void_p) for name in ("first", "second", "projection", "codebook")),
        *((name, c_void_p) for name in ("subspaces", "slots", "hot_score", "host", "held")),
        ("host_rows", c_int64),
        *((name, c_void_p) for name in ("mean", "score")),
        ("bias", Bias),
    )


class RetrieveArgs(ctypes.Structure):
    """The arguments of hkv_retrieve, as in csrc/scores.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("key", "value", "query")),
        ("heads", POINTER(Head)),
        ("fetched", c_void_p),
        ("reads", c_void_p),
        ("most", c_void_p),
        ("count", c_int64),
        *((name, c_int32) for name in ("dim", "threads")),
        *((name, c_float) for name in ("scaling", "smoothing")),
    )


class EncodeArgs(ctypes.Structure):
    """The arguments of hkv_encode, as in csrc/encode.h."""

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
    for (kind, _), one in STATE.libraries.copy().items():  # other threads may open one now
        if one is not None and (dtype is None or kind == DTYPES[dtype]):
            return one
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
