"""The decode kernels in C++ (native.cpp), loaded with ctypes; plain torch where that cannot be."""

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
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.policy.index import MeanIndex, MinMaxIndex
from hkvprof.runtime.kernels import build
from hkvprof.runtime.kernels.interface import DynamicSegment, Retrieval
from hkvprof.runtime.kernels.reference import TorchKernels

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types, as HKV_TYPE numbers them."""
MAX_GROUP, MAX_DIM = 16, 512
MEAN, MINMAX, PROJECTED = range(3)
SCORE, LOAD = 1, 2
NO_MEMORY = 2


class AttendArgs(ctypes.Structure):
    """As in native.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("key", "value", "query", "out")),
        *((name, POINTER(c_int64)) for name in ("offsets", "lengths")),
        ("segments", c_int64),
        *((name, c_int32) for name in ("dim", "threads")),
        ("scaling", c_float),
    )


class Head(ctypes.Structure):
    """As in native.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "segment", "items", "hot", "chunk", "hot_start")),
        *((name, c_int64) for name in ("codes", "channels", "items_per_group")),
        *((name, c_void_p) for name in ("first", "second", "projection", "codebook")),
        *((name, c_void_p) for name in ("subspaces", "slots", "hot_score", "host", "scale")),
        ("score", c_void_p),
    )


class RetrieveArgs(ctypes.Structure):
    """As in native.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("key", "value", "query")),
        ("heads", POINTER(Head)),
        ("fetched", POINTER(c_int64)),
        ("count", c_int64),
        *((name, c_int32) for name in ("dim", "threads", "successors")),
        *((name, c_float) for name in ("scaling", "smoothing")),
    )


class EncodeArgs(ctypes.Structure):
    """As in native.cpp."""

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


_STATE = _State()


def reset() -> None:
    """Forget what was loaded and refused, for tests."""
    _STATE.__init__()  # type: ignore[misc]


def switched_off() -> str:
    """Why native kernels are not even tried, or an empty string."""
    if os.environ.get("HKVPROF_NATIVE") == "0":
        return "HKVPROF_NATIVE=0"
    if not sys.platform.startswith("linux") or sys.byteorder != "little":
        return f"native kernels are for Linux, little endian; this is {sys.platform}"
    return ""


def status() -> str:
    """One line about this process."""
    off = switched_off() or _STATE.refused
    if off:
        return f"torch: {off}"
    loaded = sorted(group for (_, group), library in _STATE.libraries.items() if library)
    if not loaded:
        return "native: not compiled yet"
    line = f"native: query heads per KV head {', '.join(map(str, loaded))}; {_STATE.openmp}"
    return "; ".join([line, *_STATE.notes])


def library(dtype: torch.dtype, group: int) -> ctypes.CDLL | None:
    """The library for this element type and group; None, after one warning, if it cannot be had."""
    if switched_off():
        return None
    key = (DTYPES[dtype], group)
    if key in _STATE.libraries:
        return _STATE.libraries[key]
    with _STATE.lock:
        if key not in _STATE.libraries:
            _STATE.libraries[key] = None if _STATE.refused else _open(*key)
    return _STATE.libraries[key]


def _open(kind: int, group: int) -> ctypes.CDLL | None:
    try:
        path = build.library((f"HKV_TYPE={kind}", f"HKV_GROUP={group}"))
        loaded = ctypes.CDLL(str(path))
    except (build.BuildError, OSError) as error:
        _STATE.refused = str(error)
        warnings.warn(
            "hkvprof: decoding with compressed caches is slower than it could be: the native CPU "
            f"kernels are not used because {error}. HKVPROF_NATIVE=0 silences this",
            stacklevel=2,
        )
        return None
    entries, _STATE.openmp = _openmp()
    loaded.hkv_init.argtypes = (c_void_p, c_void_p)
    loaded.hkv_init.restype = None
    loaded.hkv_init(*entries)
    loaded.hkv_attend.argtypes = (POINTER(AttendArgs),)
    loaded.hkv_retrieve.argtypes = (POINTER(RetrieveArgs), ctypes.c_int)
    loaded.hkv_encode.argtypes = (POINTER(EncodeArgs),)
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
        return entries, f"threads of {path}"
    return (None, None), "one thread: torch's OpenMP runtime was not found"


def _address(function: Any) -> int | None:
    return ctypes.cast(function, c_void_p).value


def _check(outcome: int) -> None:
    if outcome == NO_MEMORY:
        raise MemoryError("no memory for the scratch space of the decode kernels")
    assert outcome == 0, f"native kernel: outcome {outcome}"


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NativeKernels:
    """See interface.Kernels. Shapes that native.cpp does not handle go to torch (see `status`)."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.torch = TorchKernels()

    @property
    def name(self) -> str:
        """`torch` once the libraries turned out to be out of reach."""
        return "torch" if switched_off() or _STATE.refused else "native"

    def _library(self, group: int, dim: int) -> ctypes.CDLL | None:
        if group <= MAX_GROUP and dim % 8 == 0 and dim <= MAX_DIM:
            return library(self.dtype, group)
        _STATE.notes[f"torch for {group} query heads per KV head of width {dim}"] = None
        return None

    def attend(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        offsets: Sequence[int],
        lengths: Sequence[int],
        query: Float[Tensor, "segments group dim"],
        scaling: float,
    ) -> Float[Tensor, "segments group dim"]:
        """Segments are split between threads; float32 accumulation (flash decoding)."""
        segments, group, dim = query.shape
        native = self._library(group, dim)
        if native is None or not self._plain(key, value) or key.shape != value.shape:
            return self.torch.attend(key, value, offsets, lengths, query, scaling)
        assert len(offsets) == len(lengths) == segments
        assert all(0 <= o <= o + n <= len(key) for o, n in zip(offsets, lengths, strict=True))
        query = query.to(self.dtype).contiguous()
        out = torch.empty_like(query)
        numbers = c_int64 * segments
        args = AttendArgs(
            key.data_ptr(),
            value.data_ptr(),
            query.data_ptr(),
            out.data_ptr(),
            numbers(*offsets),
            numbers(*lengths),
            segments,
            dim,
            torch.get_num_threads(),
            scaling,
        )
        _check(native.hkv_attend(args))
        return out

    def bind(
        self,
        storage_key: Float[Tensor, "capacity dim"],
        storage_value: Float[Tensor, "capacity dim"],
        heads: Sequence[DynamicSegment],
        scaling: float,
        smoothing: float = 0.0,
        successors: int = 0,
    ) -> Retrieval:
        """Keeps pointers to the tensors of all heads."""
        unfit = [reason for head in heads if (reason := self._unfit(head))]
        if unfit or not self._plain(storage_key, storage_value) or switched_off():
            for reason in unfit:
                _STATE.notes[f"torch for {reason}"] = None
            return self.torch.bind(
                storage_key, storage_value, heads, scaling, smoothing, successors
            )
        return NativeRetrieval(
            self, storage_key, storage_value, heads, scaling, smoothing, successors
        )

    def encode(
        self,
        projected: Float[Tensor, "tokens channels"],
        codebook: Float[Tensor, "256 channels"],
        subspaces: Sequence[tuple[int, int]],
    ) -> Int[Tensor, "tokens codes"]:
        """Any library that is loaded will do: nothing here depends on type or group."""
        opened = next((found for found in _STATE.libraries.values() if found), None)
        native = opened or library(self.dtype, 1)
        if native is None or switched_off():
            return self.torch.encode(projected, codebook, subspaces)
        projected = projected.float().contiguous()
        codebook = codebook.float().contiguous()
        bounds = torch.tensor(subspaces, dtype=torch.int32).reshape(-1, 2)
        assert codebook.shape == (256, projected.shape[1])
        assert 0 <= int(bounds.min()) <= int(bounds.max()) <= projected.shape[1]
        codes = torch.empty((len(projected), len(bounds)), dtype=torch.uint8)
        args = EncodeArgs(
            *(tensor.data_ptr() for tensor in (projected, codebook, bounds, codes)),
            len(projected),
            projected.shape[1],
            len(bounds),
            torch.get_num_threads(),
        )
        _check(native.hkv_encode(args))
        return codes

    def _plain(self, *tensors: Tensor) -> bool:
        return all(
            t.dtype == self.dtype and t.is_contiguous() and t.device.type == "cpu" for t in tensors
        )

    def _unfit(self, head: DynamicSegment) -> str:
        """Why native.cpp cannot work on this head, or an empty string."""
        host = head.host
        if not host.is_contiguous() or host.device.type != "cpu":
            return "host chunks that are not contiguous in CPU memory"
        if host.dtype != (self.dtype if head.scale is None else torch.int8):
            return f"host chunks of {host.dtype}"
        tables = getattr(head.index, "tables", None)
        if isinstance(head.index, MeanIndex | MinMaxIndex):
            return "" if self._plain(*head.index.tensors()) else "digests of another type"
        codes = getattr(head.index, "codes", None)
        if codes is None or codes.shape[1] not in (2, 4, 8) or tables.codebook.shape[1] > 256:
            return f"an index {type(head.index).__name__} of this shape"
        return ""


class NativeRetrieval:
    """See interface.Retrieval: the arguments of hkv_retrieve, filled once."""

    def __init__(
        self,
        kernels: NativeKernels,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        heads: Sequence[DynamicSegment],
        scaling: float,
        smoothing: float,
        successors: int,
    ) -> None:
        self.kernels, self.key, self.value, self.heads = kernels, key, value, tuple(heads)
        self._plain = kernels.torch.bind(key, value, heads, scaling, smoothing, successors)
        self._alive: list[Tensor] = []
        self._heads = (Head * len(heads))(*map(self._describe, heads))
        self._fetched = (c_int64 * len(heads))()
        self._segments = max((head.segment for head in heads), default=-1) + 1
        self._args = RetrieveArgs(
            key=key.data_ptr(),
            value=value.data_ptr(),
            heads=self._heads,
            fetched=self._fetched,
            count=len(heads),
            dim=key.shape[1],
            successors=successors,
            scaling=scaling,
            smoothing=smoothing,
        )

    def score(self, query: Float[Tensor, "segments group dim"]) -> list[Float[Tensor, " items"]]:
        """Expected attention of every item, per dynamic head."""
        scores = [torch.empty(head.items) for head in self.heads]
        return scores if self._run(SCORE, query, scores) else self._plain.score(query)

    def load(self, scores: Sequence[Float[Tensor, " items"]]) -> list[int]:
        """Select and fetch."""
        given = [score.float().contiguous() for score in scores]
        dim = self.key.shape[1]
        probe = self.key.new_empty((self._segments, self._group or 1, dim))
        return self._counts() if self._run(LOAD, probe, given) else self._plain.load(scores)

    def step(self, query: Float[Tensor, "segments group dim"]) -> list[int]:
        """Score and load without scores leaving the library."""
        done = self._run(SCORE | LOAD, query, ())
        return self._counts() if done else self._plain.step(query)

    _group = 0

    def _counts(self) -> list[int]:
        return list(self._fetched)

    def _run(self, what: int, query: Tensor, scores: Sequence[Tensor]) -> bool:
        segments, group, dim = query.shape
        native = self.kernels._library(group, dim)
        if native is None:
            return False
        assert segments >= self._segments
        self._group = group
        query = query.to(self.kernels.dtype).contiguous()
        for head, score in zip(self._heads, scores, strict=False):
            head.score = score.data_ptr()
        self._args.query = query.data_ptr()
        self._args.threads = torch.get_num_threads()
        _check(native.hkv_retrieve(self._args, what))
        return True

    def _describe(self, head: DynamicSegment) -> Head:
        dim = self.key.shape[1]
        assert head.host.shape == (len(head.host), 2, head.chunk, dim)
        assert 0 < head.hot <= head.items <= len(head.host)
        assert 0 <= head.hot_start <= len(self.key) - head.hot * head.chunk
        assert head.slots.dtype == torch.int32
        assert head.slots.is_contiguous()
        native = Head(
            segment=head.segment,
            items=head.items,
            hot=head.hot,
            chunk=head.chunk,
            hot_start=head.hot_start,
            items_per_group=head.items_per_group,
            slots=head.slots.data_ptr(),
            host=head.host.data_ptr(),
            hot_score=_pointer(head.hot_score),
            scale=self._hold(head.scale),
        )
        index: Any = head.index
        if isinstance(index, MeanIndex):
            native.kind, native.first = MEAN, self._hold(index.mean)
        elif isinstance(index, MinMaxIndex):
            native.kind = MINMAX
            native.first, native.second = self._hold(index.low), self._hold(index.high)
        else:
            tables = index.tables
            bounds = torch.tensor(tables.subspaces, dtype=torch.int32).reshape(-1, 2)
            native.kind, native.first = PROJECTED, self._hold(index.codes)
            native.codes, native.channels = index.codes.shape[1], tables.codebook.shape[1]
            native.projection = self._hold(tables.query_projection.float())
            native.codebook = self._hold(tables.codebook.float())
            native.subspaces = self._hold(bounds)
        return native

    def _hold(self, tensor: Tensor | None) -> int:
        """Address of a contiguous tensor, which is kept alive."""
        if tensor is None:
            return 0
        self._alive.append(tensor.contiguous())
        return self._alive[-1].data_ptr()
