"""Kernels of the decode step: C++ on the CPU, Triton on CUDA, plain torch where those cannot be.

`for_device` chooses; `status` says what was chosen and why. Triton is imported when CUDA tensors
are first met.
"""

from __future__ import annotations

import importlib
import warnings

import torch

from hkvprof.lazy import no_triton
from hkvprof.runtime.kernels import loading
from hkvprof.runtime.kernels.interface import (
    DynamicSegment,
    Extents,
    Kernels,
    QuantisedRows,
    Retrieval,
)
from hkvprof.runtime.kernels.native import NativeKernels
from hkvprof.runtime.kernels.reference import TorchKernels

__all__ = [
    "DynamicSegment",
    "Extents",
    "Kernels",
    "QuantisedRows",
    "Retrieval",
    "for_device",
    "status",
]

_TORCH = TorchKernels()
_NATIVE = {dtype: NativeKernels(dtype) for dtype in loading.DTYPES}
_ON_CUDA: dict[torch.dtype, Kernels] = {}


def for_device(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for tensors of `dtype` on `device`.

    Kernels are compiled or loaded at their first use. Where that is not possible they warn once and
    do their work in plain torch.
    """
    if dtype not in loading.DTYPES:
        return _TORCH
    if device.type == "cuda":
        if dtype not in _ON_CUDA:
            _ON_CUDA[dtype] = _for_cuda(dtype)
        return _ON_CUDA[dtype]
    return _TORCH if device.type != "cpu" or loading.switched_off() else _NATIVE[dtype]


def status() -> str:
    """One line: which kernels are used, or why the fast ones are not (yet)."""
    line = loading.status()
    if not torch.cuda.is_available():
        return line
    reason = no_triton()
    version = "" if reason else importlib.import_module("triton").__version__
    used = f"torch: {reason}" if reason else f"triton {version}"
    notes = dict.fromkeys(note for one in _ON_CUDA.values() for note in getattr(one, "notes", ()))
    return f"CUDA: {'; '.join([used, *notes])}; CPU: {line}"


def _for_cuda(dtype: torch.dtype) -> Kernels:
    if reason := no_triton():
        if not reason.startswith("HKVPROF"):
            warnings.warn(
                "hkvprof: decoding with compressed caches is slower than it could be: the Triton "
                f"kernels are not used because {reason}. HKVPROF_TRITON=0 silences this",
                stacklevel=3,
            )
        return _TORCH
    from hkvprof.runtime.kernels.triton_backend import TritonKernels

    return TritonKernels(dtype)
