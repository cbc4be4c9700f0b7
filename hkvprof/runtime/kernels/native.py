"""The decode kernels in C++ (csrc), called through ctypes; plain torch where that cannot be."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import c_int64
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hkvprof.runtime.kernels import loading
from hkvprof.runtime.kernels.interface import (
    DynamicSegment,
    Extents,
    QuantisedRows,
    Retrieval,
)
from hkvprof.runtime.kernels.loading import (
    check_extents,
    check_head,
    check_quantised,
    check_slots,
    check_storage,
    check_subspaces,
    require,
)
from hkvprof.runtime.kernels.reference import TorchKernels, counters
from hkvprof.selection.index import MeanIndex, MinMaxIndex, ProjectedIndex

MAX_GROUP, MAX_DIM = 16, 512
"""What csrc handles; widths are multiples of 8."""
MEAN, MINMAX, PROJECTED = range(3)
SCORE, LOAD = 1, 2
NO_MEMORY = 2


def _check(outcome: int) -> None:
    if outcome == NO_MEMORY:
        raise MemoryError("no memory for the scratch space of the decode kernels")
    require(outcome == 0, f"outcome 0, not {outcome}, of a native kernel")


def _integers(numbers: Sequence[int]) -> ctypes.Array[c_int64]:
    return (c_int64 * len(numbers))(*numbers)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class _Told:
    """What csrc is told about QuantisedRows that were found sound."""

    held: weakref.ref[QuantisedRows]
    shape: tuple[int, int]
    rows: int
    mean: int
    places: tuple[ctypes.Array[c_int64], ...]
    count: int


class NativeKernels:
    """See interface.Kernels. Shapes that csrc does not handle go to torch (see `status`)."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.torch = TorchKernels()
        self._told: dict[int, _Told] = {}

    @property
    def name(self) -> str:
        """`torch` once the libraries turned out to be out of reach."""
        return "torch" if loading.switched_off() or loading.STATE.refused else "native"

    @staticmethod
    def handles(group: int, dim: int) -> bool:
        """Whether csrc has code for this shape."""
        return group <= MAX_GROUP and dim <= MAX_DIM and dim % 8 == 0

    def library(self, group: int, dim: int) -> ctypes.CDLL | None:
        """The library for this shape, if it can be had."""
        if self.handles(group, dim):
            return loading.library(self.dtype, group)
        loading.STATE.notes[f"torch for {group} query heads per KV head of width {dim}"] = None
        return None

    def attend(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        extents: Extents,
        query: Float[Tensor, "segments group dim"],
        scaling: float,
        quantised: QuantisedRows | None = None,
    ) -> Float[Tensor, "segments group dim"]:
        """Segments are split between threads; float32 accumulation (flash decoding)."""
        segments, group, dim = query.shape
        native = self.library(group, dim)
        if native is None or not self._plain(key, value) or key.shape != value.shape:
            return self.torch.attend(key, value, extents, query, scaling, quantised)
        require(query.device.type == "cpu" and dim == key.shape[1], "queries as wide as keys")
        check_extents(extents.starts, extents.lengths, segments, key.shape[0])
        query = query.to(self.dtype).contiguous()
        out = torch.empty_like(query)
        args = loading.AttendArgs(
            key=key.data_ptr(),
            value=value.data_ptr(),
            query=query.data_ptr(),
            out=out.data_ptr(),
            offsets=_integers(extents.starts),
            lengths=_integers(extents.lengths),
            segments=segments,
            dim=dim,
            threads=torch.get_num_threads(),
            scaling=scaling,
        )
        if quantised is not None:
            self._tell(args, quantised)
        _check(native.hkv_attend(args))
        return out

    def _tell(self, args: loading.AttendArgs, held: QuantisedRows) -> None:
        """Where tokens in fewer bits lie; checked once, because a step has little time."""
        known = self._told.get(id(held))
        if known is None or known.held() is not held or known.shape != (args.dim, args.segments):
            known = self._told[id(held)] = self._check(held, args.dim, args.segments)
        args.rows, args.mean = known.rows, known.mean
        args.row_segments, args.row_starts, args.row_counts, args.row_bits = known.places
        args.quantised = known.count

    def _check(self, held: QuantisedRows, dim: int, segments: int) -> _Told:
        check_quantised(held, dim, segments)
        plain = self._plain(held.mean) and held.rows.is_contiguous()
        require(plain and held.rows.device.type == "cpu", "means like keys, and rows without gaps")
        number = id(held)
        return _Told(
            weakref.ref(held, lambda _: self._told.pop(number, None)),
            (dim, segments),
            held.rows.data_ptr(),
            held.mean.data_ptr(),
            tuple(map(_integers, (held.segments, held.starts, held.counts, held.bits))),
            len(held.segments),
        )

    def append(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        ends: Int[Tensor, " segments"],
        new_key: Float[Tensor, "segments tokens dim"],
        new_value: Float[Tensor, "segments tokens dim"],
    ) -> None:
        """In plain torch: a few rows."""
        self.torch.append(key, value, ends, new_key, new_value)

    def bind(
        self,
        storage_key: Float[Tensor, "capacity dim"],
        storage_value: Float[Tensor, "capacity dim"],
        heads: Sequence[DynamicSegment],
        scaling: float,
        smoothing: float = 0.0,
        counted: Sequence[Int[Tensor, " heads"]] = (),
    ) -> Retrieval:
        """Keeps pointers to the tensors of all heads."""
        unfit = [reason for head in heads if (reason := self._unfit(head))]
        if unfit or not self._plain(storage_key, storage_value) or loading.switched_off():
            for reason in unfit:
                loading.STATE.notes[f"torch for {reason}"] = None
            return self.torch.bind(storage_key, storage_value, heads, scaling, smoothing, counted)
        return NativeRetrieval(self, storage_key, storage_value, heads, scaling, smoothing, counted)

    def encode(
        self,
        projected: Float[Tensor, "tokens channels"],
        codebook: Float[Tensor, "256 channels"],
        subspaces: Sequence[tuple[int, int]],
    ) -> Int[Tensor, "tokens codes"]:
        """Any library that is loaded will do: nothing here depends on type or group."""
        native = loading.opened() or loading.library(self.dtype, 1)
        if native is None or loading.switched_off():
            return self.torch.encode(projected, codebook, subspaces)
        projected = projected.float().contiguous()
        codebook = codebook.float().contiguous()
        bounds = torch.tensor(subspaces, dtype=torch.int32).reshape(-1, 2)
        require(codebook.shape == (256, projected.shape[1]), "256 centroids of every channel")
        require(projected.device == codebook.device == bounds.device, "all of it on the CPU")
        check_subspaces(subspaces, projected.shape[1])
        codes = torch.empty((len(projected), len(bounds)), dtype=torch.uint8)
        args = loading.EncodeArgs(
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
        """Why csrc cannot work on this head, or an empty string."""
        host = head.host
        rows = [one for one in (head.held, head.coder) if one is not None]
        if not all(self._plain(one.mean) for one in rows):
            return "items in fewer bits with means of another type"
        if not host.is_contiguous() or host.device.type != "cpu":
            return "host chunks that are not contiguous in CPU memory"
        if host.dtype != (self.dtype if head.coder is None else torch.uint8):
            return f"host chunks of {host.dtype}"
        if isinstance(head.index, MeanIndex | MinMaxIndex):
            return "" if self._plain(*head.index.tensors()) else "digests of another type"
        index: Any = head.index
        fits = hasattr(index, "codes") and index.codes.shape[1] in (2, 4, 8)
        if fits and index.tables.codebook.shape[0] == 256 >= index.tables.codebook.shape[1]:
            return ""
        return f"an index {type(index).__name__} of this shape"


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
        counted: Sequence[Int[Tensor, " heads"]],
    ) -> None:
        check_storage(key, value)
        counts = counters(counted, heads, key.device)
        self.fetched, self.reads, self.most = counts
        self._smoothing = smoothing
        self.kernels, self.key, self.value, self.heads = kernels, key, value, tuple(heads)
        self._plain = kernels.torch.bind(key, value, heads, scaling, smoothing, counts)
        self._alive: list[Tensor] = []
        self.tensors: Sequence[Tensor] = ()
        self._heads = (loading.Head * len(heads))(*map(self._describe, heads))
        self._segments = max((head.segment for head in heads), default=-1) + 1
        self._args = loading.RetrieveArgs(
            key=key.data_ptr(),
            value=value.data_ptr(),
            heads=self._heads,
            fetched=self.fetched.data_ptr(),
            reads=self.reads.data_ptr(),
            most=self.most.data_ptr(),
            count=len(heads),
            dim=key.shape[1],
            scaling=scaling,
            smoothing=smoothing,
        )

    def score(self, query: Float[Tensor, "segments group dim"]) -> list[Float[Tensor, " items"]]:
        """Expected attention of every item, per dynamic head."""
        scores = [torch.empty(head.items) for head in self.heads]
        return scores if self._run(SCORE, query, scores) else self._plain.score(query)

    def load(self, scores: Sequence[Float[Tensor, " items"]]) -> None:
        """Select and fetch. Nothing here depends on the group: any library of this type will do."""
        dtype = self.kernels.dtype
        native = loading.opened(dtype) or loading.library(dtype, 1)
        if native is None or not self.kernels.handles(1, self.key.shape[1]):
            self._plain.load(scores)
        else:
            self._call(native, LOAD, [score.float().contiguous() for score in scores])

    def step(self, query: Float[Tensor, "segments group dim"]) -> None:
        """Score and load without scores leaving the library."""
        if not self._run(SCORE | LOAD, query, ()):
            self._plain.step(query)

    def step_some(
        self, query: Float[Tensor, "segments group dim"], chosen: Bool[Tensor, " heads"]
    ) -> None:
        """In plain torch: only prefetching asks for it, which is for CUDA devices."""
        self._plain.step_some(query, chosen)

    def _run(self, what: int, query: Tensor, scores: Sequence[Tensor]) -> bool:
        segments, group, dim = query.shape
        native = self.kernels.library(group, dim)
        if native is None:
            return False
        require(segments >= self._segments, "a query for every dynamic head's segment")
        require(dim == self.key.shape[1], "queries as wide as keys")
        require(query.device.type == "cpu", "queries on the CPU")
        query = query.to(self.kernels.dtype).contiguous()
        self._args.query = query.data_ptr()
        self._call(native, what, scores)
        return True

    def _call(self, native: ctypes.CDLL, what: int, scores: Sequence[Tensor]) -> None:
        if what != SCORE | LOAD:
            self._give(scores)
        self._args.threads = torch.get_num_threads()
        _check(native.hkv_retrieve(self._args, what))

    def _give(self, scores: Sequence[Tensor]) -> None:
        """Where scores are to be read or written."""
        require(len(scores) == len(self.heads), "scores of every dynamic head")
        for head, native_head, score in zip(self.heads, self._heads, scores, strict=True):
            plain = score.dtype == torch.float32 and score.is_contiguous()
            require(plain and score.device.type == "cpu", "scores as float32 on the CPU")
            require(score.shape == (head.items,), "a score per item")
            native_head.score = score.data_ptr()

    def _describe(self, head: DynamicSegment) -> loading.Head:
        check_head(head, self.key, self._smoothing)
        check_slots(head)
        native = loading.Head(
            segment=head.segment,
            items=head.items,
            hot=head.hot,
            chunk=head.chunk,
            hot_start=head.hot_start,
            rerank=head.rerank,
            fresh=head.fresh,
            slots=head.slots.data_ptr(),
            host=head.host.data_ptr(),
            hot_score=_pointer(head.hot_score),
        )
        rows = head.held or head.coder
        if rows is not None:
            native.bits, native.mean = rows.format.bits, self._hold(rows.mean)
            native.held = _pointer(None if head.held is None else head.held.rows)
            native.host_rows = int(head.coder is not None)
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
            if tables.bias is not None:
                native.bias = self._bias(index)
        return native

    def _bias(self, index: ProjectedIndex) -> loading.Bias:
        """Its pairs that are not zero, which come first; one axis of positions stands for all."""
        bias, positions = index.tables.bias, index.positions
        assert bias is not None
        assert positions is not None
        told, places = positions.told, bias.places
        if told is not None:
            places = places.clone()
            places[2] = 0 if len(told) == 1 else places[2]
            self._alive.append(told)
        return loading.Bias(
            pairs=int(bias.constants[:2].any(dim=0).sum()),
            first=positions.first,
            told_stride=0 if told is None else told.stride(0),
            constants=self._hold(bias.constants),
            places=self._hold(places),
            told=_pointer(told),
            stride=bias.constants.shape[1],
        )

    def _hold(self, tensor: Tensor | None) -> int:
        """Address of a contiguous tensor, which is kept alive."""
        if tensor is None:
            return 0
        self._alive.append(tensor.contiguous())
        return self._alive[-1].data_ptr()
