"""Attention in Triton over ragged segments, against dense attention in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.runtime.kernels import Extents
from tests.runtime.kernels.cases import DTYPES, PRECISION, attend_exactly
from tests.runtime.kernels.test_attend import segments
from tests.runtime.kernels.triton_cases import DEVICES, QUIET, triton_kernels

pytestmark = QUIET

LENGTHS = st.one_of(st.sampled_from([0, 1, 2, 127, 128, 129, 251]), st.integers(0, 300))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(LENGTHS, min_size=1, max_size=4),
    slack=st.integers(0, 200),
    group=st.integers(1, 8) | st.just(17),
    dim=st.sampled_from([8, 64, 80, 96, 128, 256]),
    programs=st.sampled_from([1, 7, 512]),
    data=st.data(),
)
def test_ragged_segments(
    device: str,
    dtype: torch.dtype,
    lengths: list[int],
    slack: int,
    group: int,
    dim: int,
    programs: int,
    data: st.DataObject,
) -> None:
    """Whatever the number of splits; what lies between segments is NaN, and is never seen."""
    from hkvprof.runtime.kernels.triton_attend import attend

    seed = data.draw(st.integers(0, 2**31))
    key, value, offsets, query = segments(lengths, 3, dim, group, dtype, seed)
    ends = [0, *map(int.__add__, offsets, lengths)]
    for end, start in zip(ends, [*offsets, len(key)], strict=True):
        key[end:start] = value[end:start] = torch.nan
    bad = data.draw(st.integers(-1, len(lengths) - 1))  # one segment has a NaN key
    if bad >= 0 and lengths[bad]:
        key[offsets[bad] + lengths[bad] // 2, dim // 2] = torch.nan
    exact = attend_exactly(key, value, offsets, lengths, query, dim**-0.5)
    extents = Extents.of(offsets, lengths, device)
    got = attend(
        key.to(device),
        value.to(device),
        replace(extents, longest=extents.longest + slack),
        query.to(device),
        dim**-0.5,
        programs=programs,
    )
    assert got.dtype == dtype
    assert got.shape == query.shape
    precision = 8 * PRECISION[dtype]  # on a device weights are rounded too
    torch.testing.assert_close(
        got.double().cpu(), exact, rtol=precision, atol=precision, equal_nan=True
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_huge_logits(device: str, dtype: torch.dtype) -> None:
    """Minus infinity is weight 0, also where whole splits have nothing else."""
    lengths = [900, 3]
    key, value, offsets, query = segments(lengths, 0, 64, 7, dtype, 0)
    query = query.abs() + 0.1
    key[:700] = -torch.inf
    key[700:] *= 30
    kernels, extents = triton_kernels(dtype), Extents.of(offsets, lengths, device)
    exact = attend_exactly(key, value, offsets, lengths, query, 0.125)

    def run() -> torch.Tensor:
        moved = [tensor.to(device) for tensor in (key, value, query)]
        return kernels.attend(moved[0], moved[1], extents, moved[2], 0.125).cpu()

    got = run()
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), exact, rtol=0.01, atol=0.01)
    key[800, 3] = torch.inf
    got = run()
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_goes_to_torch_and_is_noted(device: str) -> None:
    kernels = triton_kernels(torch.float32)
    key, value, offsets, query = segments([20, 5], 1, 264, 3, torch.float32, 2)
    exact = attend_exactly(key, value, offsets, [20, 5], query, 0.1)
    extents = Extents.of(offsets, [20, 5], device)
    got = kernels.attend(key.to(device), value.to(device), extents, query.to(device), 0.1)
    torch.testing.assert_close(got.double().cpu(), exact, rtol=1e-5, atol=1e-5)
    assert list(kernels.notes) == ["torch for 3 query heads per KV head of widths 264 and 264"]
