"""Where the Triton kernels are tested: in Triton's interpreter, or on a CUDA device (`gpu`)."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hkvprof.runtime.kernels import DynamicSegment, Kernels
from hkvprof.selection.index import MeanIndex, MinMaxIndex
from tests.runtime.kernels.cases import Layer

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not INTERPRETED,
            reason="the CUDA device is used instead" if HAS_TRITON else "triton is not installed",
        ),
        id="interpreter",
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not HAS_TRITON or INTERPRETED or not torch.cuda.is_available(),
                reason="needs triton and a CUDA device",
            ),
        ],
    ),
]
"""For `pytest.mark.parametrize("device", DEVICES)`."""

QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")
"""The interpreter computes with numpy, which warns of NaN and infinity."""


def triton_kernels(dtype: torch.dtype) -> Kernels:
    """The kernels under test."""
    from hkvprof.runtime.kernels.triton_backend import TritonKernels

    return TritonKernels(dtype)


def moved(layer: Layer, device: str) -> Layer:
    """The same state in memory of its own: host items pinned, all else on the device."""
    own = layer.copy()
    heads = [_moved(head, device) for head in own.heads]
    return Layer(own.key.to(device), own.value.to(device), heads, own.query.to(device))


def _moved(head: DynamicSegment, device: str) -> DynamicSegment:
    if device == "cpu" and not head.host.is_pinned():
        return head
    index: Any = head.index
    if isinstance(index, MeanIndex):
        index = MeanIndex(index.mean.to(device))
    elif isinstance(index, MinMaxIndex):
        index = MinMaxIndex(index.low.to(device), index.high.to(device))
    else:
        tables = index.tables
        projections = {
            name: getattr(tables, name).to(device)
            for name in ("query_projection", "key_projection", "key_mean", "codebook")
        }
        index = replace(index, codes=index.codes.to(device), tables=replace(tables, **projections))

    def hosted(tensor: Tensor) -> Tensor:
        return tensor.cpu() if device == "cpu" else tensor.pin_memory()

    rows = head.held
    if rows is not None:
        rows = replace(rows.on(torch.device(device)), rows=rows.rows.to(device))
    return replace(
        head,
        index=index,
        held=rows,
        slots=head.slots.to(device),
        host=hosted(head.host),
        hot_score=None if head.hot_score is None else head.hot_score.to(device),
    )
