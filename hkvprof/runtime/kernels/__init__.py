"""Kernels of the decode step: C++ on the CPU where a compiler is at hand, plain torch elsewhere.

`for_device` chooses; `status` says what was chosen and why.
"""

from __future__ import annotations

import torch

from hkvprof.runtime.kernels import loading
from hkvprof.runtime.kernels.interface import DynamicSegment, Extents, Kernels, Retrieval
from hkvprof.runtime.kernels.native import NativeKernels
from hkvprof.runtime.kernels.reference import TorchKernels

__all__ = ["DynamicSegment", "Extents", "Kernels", "Retrieval", "for_device", "status"]

_TORCH = TorchKernels()
_NATIVE = {dtype: NativeKernels(dtype) for dtype in loading.DTYPES}


def for_device(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for tensors of `dtype` on `device`.

    The C++ kernels are compiled or loaded at their first use. Where that is not possible they warn
    once and do their work in plain torch.
    """
    if device.type != "cpu" or dtype not in loading.DTYPES or loading.switched_off():
        return _TORCH
    return _NATIVE[dtype]


def status() -> str:
    """One line: which CPU kernels are used, or why the native ones are not (yet)."""
    return loading.status()
