"""Attention to tokens in fewer bits beside exact ones, against dense attention in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.runtime import kernels
from hkvprof.runtime.kernels import Extents, QuantisedRows
from hkvprof.selection.residents import Residents
from tests.runtime.kernels.cases import DTYPES, PRECISION, compiler, rows_exactly

CPU = torch.device("cpu")
LENGTHS = st.one_of(st.sampled_from([0, 0, 1, 2, 63, 64, 65, 321]), st.integers(0, 400))
# Every (type, group) is a compilation of its own.
GROUPS = {torch.bfloat16: (1, 3, 7), torch.float16: (4, 7), torch.float32: (2, 8, 11, 16)}


@dataclass
class Layer:
    """Segments with exact tokens in storage and tokens in fewer bits, any of them none."""

    key: Tensor
    value: Tensor
    extents: Extents
    held: dict[int, Residents]
    query: Tensor

    @property
    def rows(self) -> QuantisedRows | None:
        return QuantisedRows.of(self.held)


def make_layer(
    exact: Sequence[int],
    quantised: Sequence[tuple[int, int]],
    dim: int,
    group: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> Layer:
    """`quantised`: tokens and bits of every segment. Keys have a bias and some wide channels."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    starts = [sum(exact[:number]) for number in range(len(exact))]
    key, value = (normal(sum(exact), dim).to(dtype) for _ in range(2))
    held = {}
    for number, (tokens, bits) in enumerate(quantised):
        if tokens:
            own = (normal(tokens, dim) * (1 + normal(dim).abs()) + 3 * normal(dim)).to(dtype)
            more = (normal(tokens, dim) + normal(dim)).to(dtype)
            held[number] = Residents.around(own, more, bits).append(own, more)
    query = normal(len(exact), group, dim).to(dtype)
    return Layer(key, value, Extents.of(starts, exact), held, query)


def attend_exactly(layer: Layer, scaling: float) -> Tensor:
    """One softmax over all tokens of a segment, in float64."""
    outs = []
    for number, (start, length) in enumerate(
        zip(layer.extents.starts, layer.extents.lengths, strict=True)
    ):
        own = slice(start, start + length)
        keys, values = layer.key[own].double(), layer.value[own].double()
        if number in layer.held:
            held = layer.held[number]
            more = rows_exactly(held, held.rows)
            keys, values = torch.cat([keys, more[0]]), torch.cat([values, more[1]])
        weights = (layer.query[number].double() @ keys.T * scaling).softmax(-1)
        outs.append(weights @ values if len(keys) else torch.zeros_like(layer.query[0]).double())
    return torch.stack(outs)


def attend(layer: Layer, scaling: float) -> Tensor:
    native = kernels.for_device(CPU, layer.query.dtype)
    assert native.name == "native", kernels.status()
    return native.attend(layer.key, layer.value, layer.extents, layer.query, scaling, layer.rows)


def compare(layer: Layer, scaling: float) -> None:
    got, exact = attend(layer, scaling), attend_exactly(layer, scaling)
    assert got.dtype == layer.query.dtype
    # Values are of order 1 to 10; logits of order 10 are a float32's rounding off.
    precision = PRECISION[layer.query.dtype] * 2
    torch.testing.assert_close(got.double(), exact, rtol=precision, atol=precision)


@compiler
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.lists(st.tuples(LENGTHS, LENGTHS, st.sampled_from([8, 4])), min_size=1, max_size=6),
    dim=st.sampled_from([8, 16, 24, 32, 40, 64, 80, 96, 112, 128, 256]),
    data=st.data(),
)
def test_exact_tokens_and_tokens_in_fewer_bits_share_a_softmax(
    dtype: torch.dtype, tokens: list[tuple[int, int, int]], dim: int, data: st.DataObject
) -> None:
    group = data.draw(st.sampled_from(GROUPS[dtype]))
    seed = data.draw(st.integers(0, 2**31))
    exact = [one for one, _, _ in tokens]
    quantised = [(count, bits) for _, count, bits in tokens]
    compare(make_layer(exact, quantised, dim, group, dtype, seed), dim**-0.5)


@compiler
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", range(8, 264, 8))
def test_every_width(dim: int, bits: int) -> None:
    compare(make_layer([3, 0], [(70, bits), (129, bits)], dim, 7, torch.bfloat16), dim**-0.5)


@compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_parts_and_threads(dtype: torch.dtype) -> None:
    """Parts of a segment are merged by whichever thread is last."""
    layer = make_layer([700, 0, 5], [(3000, 4), (1500, 8), (0, 8)], 64, 4, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        compare(layer, 0.125)
    finally:
        torch.set_num_threads(threads)


@compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_few_heavy_tokens_do_not_hide_many_light_ones(dtype: torch.dtype, bits: int) -> None:
    """A sink in the first block, and thousands whose weights together are as large as its own."""
    layer = make_layer([1], [(8000, bits)], 32, 4, dtype)
    layer.key[0] = layer.held[0].mean[0]
    layer.query[:] = layer.key[0] * (9 / layer.key[0].float().square().sum())
    layer.key[0] *= 2
    exact = attend_exactly(layer, 1.0)
    torch.testing.assert_close(
        attend(layer, 1.0).double(), exact, rtol=PRECISION[dtype] * 2, atol=PRECISION[dtype] * 2
    )


@compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_huge_logits_do_not_overflow(dtype: torch.dtype, bits: int) -> None:
    layer = make_layer([20], [(200, bits)], 32, 7, dtype)
    layer.query *= 1e3
    got, exact = attend(layer, 1.0), attend_exactly(layer, 1.0)
    assert got.isfinite().all()
    # Logits of 10,000 leave one token: it may be another where two are within the rounding.
    close = (got.double() - exact).abs().amax(-1) < 0.05
    assert close.float().mean() > 0.8


@compiler
def test_a_query_that_is_not_finite_gives_nothing_finite_and_harms_no_other() -> None:
    layer = make_layer([3, 3], [(100, 8), (100, 4)], 32, 7, torch.float32)
    layer.query[0, 2, 5] = torch.nan
    layer.query[1, 3, 7] = torch.inf
    got = attend(layer, 0.2)
    assert got[0, 2].isnan().all()
    assert got[1, 3].isnan().all()
    got[0, 2] = got[1, 3] = layer.query[0, 2] = layer.query[1, 3] = 0
    exact = attend_exactly(layer, 0.2)
    exact[0, 2] = exact[1, 3] = 0
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@compiler
def test_a_query_of_zeros_attends_alike() -> None:
    layer = make_layer([2], [(50, 4)], 16, 2, torch.float32)
    layer.query[:] = 0
    compare(layer, 0.25)
