"""Attention in Triton to tokens in fewer bits beside exact ones, against float64 and torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.runtime.kernels import Extents
from hkvprof.runtime.kernels.reference import TorchKernels
from tests.runtime.kernels.cases import DTYPES, PRECISION
from tests.runtime.kernels.test_quantised import Layer, attend_exactly, make_layer
from tests.runtime.kernels.triton_cases import DEVICES, QUIET

pytestmark = [QUIET, pytest.mark.parametrize("device", DEVICES)]
LENGTHS = st.one_of(st.sampled_from([0, 0, 1, 2, 63, 64, 65, 129]), st.integers(0, 200))


def on(layer: Layer, device: str) -> Layer:
    held = {n: replace(one.on(torch.device(device)), rows=one.rows.to(device))
            for n, one in layer.held.items()}  # fmt: skip
    extents = Extents.of(layer.extents.starts, layer.extents.lengths, device)
    key, value, query = (part.to(device) for part in (layer.key, layer.value, layer.query))
    return Layer(key, value, extents, held, query)


def attend(layer: Layer, scaling: float, device: str, programs: int = 512) -> torch.Tensor:
    from hkvprof.runtime.kernels import triton_attend

    own = on(layer, device)
    got = triton_attend.attend(
        own.key, own.value, own.extents, own.query, scaling, own.rows, programs
    )
    assert got.dtype == layer.query.dtype
    return got.cpu()


def compare(layer: Layer, scaling: float, device: str, programs: int = 512) -> None:
    got, exact = attend(layer, scaling, device, programs), attend_exactly(layer, scaling)
    precision = PRECISION[layer.query.dtype] * 4
    torch.testing.assert_close(got.double(), exact, rtol=precision, atol=precision)
    defined = TorchKernels().attend(
        layer.key, layer.value, layer.extents, layer.query, scaling, layer.rows
    )
    # The definition rounds keys and values to the model's dtype.
    torch.testing.assert_close(got, defined, rtol=8 * precision, atol=8 * precision)


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.lists(st.tuples(LENGTHS, LENGTHS, st.sampled_from([8, 4])), min_size=1, max_size=4),
    dim=st.sampled_from([8, 16, 24, 64, 80, 96, 128, 256]),
    group=st.integers(1, 8) | st.just(17),
    programs=st.sampled_from([1, 5, 512]),
    seed=st.integers(0, 2**31),
)
def test_exact_tokens_and_tokens_in_fewer_bits_share_a_softmax(
    device: str,
    dtype: torch.dtype,
    tokens: list[tuple[int, int, int]],
    dim: int,
    group: int,
    programs: int,
    seed: int,
) -> None:
    exact = [one for one, _, _ in tokens]
    quantised = [(count, bits) for _, count, bits in tokens]
    compare(make_layer(exact, quantised, dim, group, dtype, seed), dim**-0.5, device, programs)
