"""Logits of keys with a bias that turns with positions, in C++, against complex numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.runtime import kernels
from hkvprof.runtime.kernels import DynamicSegment
from hkvprof.runtime.kernels.interface import Retrieval
from hkvprof.runtime.kernels.native import NativeRetrieval
from hkvprof.runtime.kernels.reference import TorchKernels
from hkvprof.selection.index import ProjectedIndex
from tests.runtime.kernels.cases import DTYPES, compiler, make_layer

CPU = torch.device("cpu")
GROUPS = {torch.bfloat16: (1, 7), torch.float16: (4,), torch.float32: (2, 11)}
SCALING = 0.2


def exactly(head: DynamicSegment, query: Tensor) -> Tensor:
    """Scores in float64: a pair of channels is a complex number, and turning it a product."""
    index = head.index
    assert isinstance(index, ProjectedIndex)
    bias, positions = index.tables.bias, index.positions
    assert bias is not None
    assert positions is not None
    first, second, axis = bias.places.long()
    counted = torch.arange(positions.first, positions.first + head.items).expand(3, -1)
    told = counted if positions.told is None else positions.told
    constants = bias.constants.double()
    angle = told[axis].T * constants[2]
    turned = torch.complex(constants[0], constants[1]) * torch.polar(torch.ones_like(angle), angle)
    query = query.double()
    asked = torch.complex(query[:, first], query[:, second])
    logits = (asked[:, None].conj() * turned).real.sum(-1)
    projected = query @ index.tables.query_projection.double()
    for code, (begin, end) in enumerate(index.tables.subspaces):
        chosen = index.tables.codebook[index.codes[:, code].long(), begin:end].double()
        logits += projected[:, begin:end] @ chosen.T
    return (logits * SCALING).softmax(-1).mean(0)


def bound(layer_dtype: torch.dtype, layer: object) -> list[Retrieval]:
    key, value, heads = (getattr(layer, name) for name in ("key", "value", "heads"))
    own = kernels.for_device(CPU, layer_dtype)
    return [one.bind(key, value, heads, SCALING) for one in (TorchKernels(), own)]


@compiler
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from(["plain", "told"]),
    codes=st.sampled_from([2, 4, 8]),
    dim=st.sampled_from([8, 64, 80]),
    items=st.lists(st.integers(1, 1300), min_size=1, max_size=3),
    data=st.data(),
)
def test_scores_hold_the_waves_of_the_bias(
    seed: int,
    dtype: torch.dtype,
    bias: str,
    codes: int,
    dim: int,
    items: list[int],
    data: st.DataObject,
) -> None:
    group = data.draw(st.sampled_from(GROUPS[dtype]))
    layer = make_layer(
        seed, "projected", items, [1] * len(items), group=group, dim=dim, codes=codes,
        dtype=dtype, bias=bias,
    )  # fmt: skip
    plain, native = bound(dtype, layer)
    assert isinstance(native, NativeRetrieval)
    for one in (plain, native):
        for head, score in zip(layer.heads, one.score(layer.query), strict=True):
            wanted = exactly(head, layer.query[head.segment])
            # Angles of 5,000 radians are float32 numbers 5e-4 apart.
            torch.testing.assert_close(score.double(), wanted, rtol=1e-2, atol=1e-9)


@compiler
@pytest.mark.parametrize("bias", ["plain", "told"])
def test_a_step_fetches_what_the_definition_fetches(bias: str) -> None:
    layer = make_layer(
        5, "projected", [900, 40], [30, 8], dim=32, dtype=torch.float32, bias=bias, rerank=8
    )
    both = []
    for kernel in (TorchKernels(), kernels.for_device(CPU, torch.float32)):
        own = layer.copy()
        retrieval = kernel.bind(own.key, own.value, own.heads, SCALING)
        retrieval.step(own.query)
        both.append([set(head.slots.tolist()) for head in own.heads])
        both.append(retrieval.fetched.tolist())
    assert both[:2] == both[2:]


@compiler
def test_a_bias_of_zeros_changes_nothing() -> None:
    layer = make_layer(3, "projected", [700], [4], dtype=torch.float32, bias="plain")
    index = layer.heads[0].index
    assert isinstance(index, ProjectedIndex)
    assert index.tables.bias is not None
    index.tables.bias.constants[:2] = 0
    without = make_layer(3, "projected", [700], [4], dtype=torch.float32)
    kernel = kernels.for_device(CPU, torch.float32)
    scores = [
        kernel.bind(one.key, one.value, one.heads, SCALING).score(layer.query)[0]
        for one in (layer, without)
    ]
    codes = [one.heads[0].index for one in (layer, without)]
    assert torch.equal(codes[0].codes, codes[1].codes)  # type: ignore[attr-defined]
    assert torch.equal(scores[0], scores[1])


def test_positions_that_are_missing_are_refused() -> None:
    layer = make_layer(3, "projected", [70], [4], dtype=torch.float32, bias="plain")
    index = layer.heads[0].index
    assert isinstance(index, ProjectedIndex)
    assert index.positions is not None
    object.__setattr__(index, "positions", index.positions.part(0, 69))
    with pytest.raises(Exception, match="positions of every item"):
        kernels.for_device(CPU, torch.float32).bind(layer.key, layer.value, layer.heads, SCALING)
