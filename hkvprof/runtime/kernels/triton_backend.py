"""The decode kernels in Triton: CUDA tensors, or CPU tensors under Triton's interpreter.

Nothing here makes the host wait for the device: grids come from numbers that the host knows, and
what was fetched is counted on the device. Importing this module imports triton; `for_device` does
so when it meets CUDA tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.runtime.devices import at
from hkvprof.runtime.kernels import triton_attend
from hkvprof.runtime.kernels.interface import (
    DynamicSegment,
    Extents,
    QuantisedRows,
    Retrieval,
)
from hkvprof.runtime.kernels.loading import check_quantised, require
from hkvprof.runtime.kernels.reference import TorchKernels
from hkvprof.runtime.kernels.triton_common import DTYPES, INTERPRETED
from hkvprof.runtime.kernels.triton_retrieval import TritonRetrieval
from hkvprof.selection.index import MeanIndex, MinMaxIndex, ProjectedIndex

MAX_GROUP, MAX_DIM = 64, 256
CODES = (2, 4, 8)


class TritonKernels:
    """See interface.Kernels. What these kernels do not handle goes to torch and into `notes`."""

    name = "triton"

    def __init__(self, dtype: torch.dtype) -> None:
        assert dtype in DTYPES
        self.dtype = dtype
        self.torch = TorchKernels()
        self.notes: dict[str, None] = {}
        self._sound: dict[int, weakref.ref[QuantisedRows]] = {}

    def attend(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        extents: Extents,
        query: Float[Tensor, "segments group dim"],
        scaling: float,
        quantised: QuantisedRows | None = None,
    ) -> Float[Tensor, "segments group dim"]:
        """Split-KV: products in the tensors' dtype, accumulation and softmax in float32."""
        reason = self._unfit_shape(key, value, query.shape[1])
        if reason := reason or self._unfit_rows(key, quantised):
            self.notes[f"torch for {reason}"] = None
            return self.torch.attend(key, value, extents, query, scaling, quantised)
        require(query.shape[2] == key.shape[1], "queries as wide as keys")
        require(len(query) == len(extents.device_starts), "a start and an end per segment")
        if quantised is not None:
            self._check(quantised, key.shape[1], len(query))
        own = query.to(self.dtype).contiguous()
        with at(key.device):
            return triton_attend.attend(key, value, extents, own, scaling, quantised)

    def _check(self, held: QuantisedRows, dim: int, segments: int) -> None:
        """Once, because a step has little time."""
        number, told = id(held), self._sound.get(id(held))
        if told is None or told() is not held:
            check_quantised(held, dim, segments)
            require(held.rows.is_contiguous(), "rows without gaps")
            plain = held.mean.dtype == self.dtype and held.mean.is_contiguous()
            require(plain, "means like keys")
            self._sound[number] = weakref.ref(held, lambda _: self._sound.pop(number, None))

    def append(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        ends: Int[Tensor, " segments"],
        new_key: Float[Tensor, "segments tokens dim"],
        new_value: Float[Tensor, "segments tokens dim"],
    ) -> None:
        """One token in one launch; several, or of another shape or type, in torch."""
        plain = key.dtype == new_key.dtype == new_value.dtype
        if new_key.shape[1] != 1 or not plain or self._unfit_shape(key, value, 1):
            self.torch.append(key, value, ends, new_key, new_value)
            return
        with at(key.device):
            triton_attend.append(key, value, ends, new_key, new_value)

    def bind(
        self,
        storage_key: Float[Tensor, "capacity dim"],
        storage_value: Float[Tensor, "capacity dim"],
        heads: Sequence[DynamicSegment],
        scaling: float,
        smoothing: float = 0.0,
        counted: Sequence[Int[Tensor, " heads"]] = (),
    ) -> Retrieval:
        """Keeps addresses of the tensors of all heads."""
        plain = self._unfit_shape(storage_key, storage_value, 1)
        unfit = [plain] if plain else [self._unfit(head) for head in heads]
        args = (storage_key, storage_value, heads, scaling, smoothing, counted)
        if any(unfit):
            self.notes.update({f"torch for {reason}": None for reason in unfit if reason})
            return self.torch.bind(*args)
        return TritonRetrieval(*args)

    def encode(
        self,
        projected: Float[Tensor, "tokens channels"],
        codebook: Float[Tensor, "256 channels"],
        subspaces: Sequence[tuple[int, int]],
    ) -> Int[Tensor, "tokens codes"]:
        """In plain torch: one product per code, at compressions only."""
        return self.torch.encode(projected, codebook, subspaces)

    def _unfit_shape(self, key: Tensor, value: Tensor, group: int) -> str:
        """Why these kernels cannot work on this storage, or an empty string."""
        if key.shape != value.shape or key.shape[1] > MAX_DIM or group > MAX_GROUP:
            widths = f"{key.shape[1]} and {value.shape[1]}"
            return f"{group} query heads per KV head of widths {widths}"
        if any(t.dtype != self.dtype or not t.is_contiguous() for t in (key, value)):
            return f"storage of {key.dtype} and {value.dtype} that is not plain {self.dtype}"
        if INTERPRETED and key.is_cuda:
            return "CUDA tensors, whose addresses Triton's interpreter cannot read"
        return ""

    def _unfit_rows(self, key: Tensor, held: QuantisedRows | None) -> str:
        """Why these kernels cannot read these tokens in fewer bits, or an empty string."""
        if held is None:
            return ""
        return f"tokens in fewer bits of width {key.shape[1]}" if key.shape[1] % 8 else ""

    def _unfit(self, head: DynamicSegment) -> str:
        """Why these kernels cannot work on this head, or an empty string."""
        host, index = head.host, head.index
        on_cuda = head.slots.is_cuda
        rows = head.held or head.coder
        if rows is not None and rows.mean.shape[-1] % 8:
            return f"items in fewer bits of width {rows.mean.shape[-1]}"
        if rows is not None and (rows.mean.dtype != self.dtype or not rows.mean.is_contiguous()):
            return "items in fewer bits with means of another type"
        if not host.is_contiguous():
            return "host chunks that are not contiguous"
        if on_cuda and not (host.is_cuda or host.is_pinned()):
            return "host chunks that are not in pinned memory"
        if host.dtype != (self.dtype if head.coder is None else torch.uint8):
            return f"host chunks of {host.dtype}"
        if isinstance(index, MeanIndex | MinMaxIndex):
            same = all(t.dtype == self.dtype and t.is_contiguous() for t in index.tensors())
            return "" if same else "digests of another type"
        if isinstance(index, ProjectedIndex):
            if index.tables.bias is not None:
                return "keys with a bias that turns with their positions"
            fits = index.codes.shape[1] in CODES and len(index.tables.codebook) == 256
            return "" if fits else f"{index.codes.shape[1]} codes per token"
        return f"an index {type(index).__name__}"
