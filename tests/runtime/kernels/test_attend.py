"""Attention of one new token over ragged segments, against dense attention in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.runtime import kernels
from hkvprof.runtime.kernels import Extents, Kernels, loading
from hkvprof.runtime.kernels.reference import TorchKernels
from tests.runtime.kernels.cases import DTYPES, PRECISION, attend_exactly, compiler

CPU = torch.device("cpu")
LENGTHS = st.one_of(st.sampled_from([0, 1, 2, 63, 64, 65, 251, 257, 1021]), st.integers(0, 700))
# Every (type, group) is a compilation of its own.
GROUPS = {torch.bfloat16: (1, 3, 7), torch.float16: (4, 7), torch.float32: (2, 8, 11)}


def both(dtype: torch.dtype) -> list[Kernels]:
    return [TorchKernels(), kernels.for_device(CPU, dtype)]


def segments(
    lengths: list[int], gaps: int, dim: int, group: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, list[int], Tensor]:
    random = torch.Generator().manual_seed(seed)
    offsets, total = [], 0
    for length in lengths:
        offsets.append(total + gaps)
        total += gaps + length
    key, value = (torch.randn(total + gaps, dim, generator=random).to(dtype) for _ in range(2))
    query = (2 * torch.randn(len(lengths), group, dim, generator=random)).to(dtype)
    return key, value, offsets, query


@compiler
@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(LENGTHS, min_size=1, max_size=6)
    | st.tuples(LENGTHS, st.integers(2, 5)).map(lambda pair: [pair[0]] * pair[1]),
    gaps=st.integers(0, 3),
    dim=st.sampled_from([8, 32, 64, 80, 128, 256]),
    data=st.data(),
)
def test_ragged_segments(
    dtype: torch.dtype, lengths: list[int], gaps: int, dim: int, data: st.DataObject
) -> None:
    group = data.draw(st.sampled_from(GROUPS[dtype]))
    seed = data.draw(st.integers(0, 2**31))
    key, value, offsets, query = segments(lengths, gaps, dim, group, dtype, seed)
    bad = data.draw(st.integers(-1, len(lengths) - 1))  # one segment has a NaN key
    if bad >= 0 and lengths[bad]:
        key[offsets[bad] + lengths[bad] // 2, dim // 2] = torch.nan
    exact = attend_exactly(key, value, offsets, lengths, query, dim**-0.5)
    before = kernels.status().count("torch for")  # what other tests of the process asked for
    for kernel in both(dtype):
        got = kernel.attend(key, value, Extents.of(offsets, lengths), query, dim**-0.5)
        assert got.dtype == dtype
        assert got.shape == query.shape
        # Torch rounds logits and weights too: the rounding of a logit of order 5 is a relative
        # error of its weight, and a mean of values of order 1 leaves it in place.
        precision = PRECISION[dtype] * (16 if kernel.name == "torch" else 1.5)
        torch.testing.assert_close(
            got.double(), exact, rtol=precision, atol=precision, equal_nan=True
        )
    assert kernels.status().count("torch for") == before


@compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_logits_and_many_threads(dtype: torch.dtype) -> None:
    """Minus infinity is weight 0, also where a whole part of a segment has nothing else."""
    key, value, offsets, query = segments([2000, 3], 0, 64, 7, dtype, 0)
    query = query.abs() + 0.1
    key[:1500] = -torch.inf
    exact = attend_exactly(key, value, offsets, [2000, 3], query, 0.125)
    extents = Extents.of(offsets, [2000, 3])
    got = kernels.for_device(CPU, dtype).attend(key, value, extents, query, 0.125)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), exact, rtol=0.01, atol=0.01)
    key[1700, 3] = torch.inf
    got = kernels.for_device(CPU, dtype).attend(key, value, extents, query, 0.125)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


@compiler
def test_huge_logits_do_not_overflow() -> None:
    key, value, offsets, query = segments([500], 0, 32, 7, torch.float32, 1)
    key, query = key * 1e3, query * 1e3
    exact = attend_exactly(key, value, offsets, [500], query, 1.0)
    extents = Extents.of(offsets, [500])
    got = kernels.for_device(CPU, torch.float32).attend(key, value, extents, query, 1.0)
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3)


@compiler
@pytest.mark.parametrize(("group", "dim"), [(17, 64), (4, 36)])
def test_shapes_without_native_code_go_to_torch_and_say_so(
    group: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "STATE", loading._State())
    key, value, offsets, query = segments([100], 0, dim, group, torch.float32, 2)
    kernel = kernels.for_device(CPU, torch.float32)
    kernel.attend(key, value, Extents.of(offsets, [100]), query, 0.1)
    key, value, offsets, query = segments([5], 0, 8, 7, torch.float32, 2)
    kernel.attend(key, value, Extents.of(offsets, [5]), query, 0.1)
    assert f"torch for {group} query heads per KV head of width {dim}" in kernels.status()


@compiler
def test_one_openmp_runtime_only() -> None:
    """The threads are torch's: a second pool would spin against the first."""
    key, value, offsets, query = segments([5], 0, 8, 7, torch.float32, 2)
    extents = Extents.of(offsets, [5])
    kernels.for_device(CPU, torch.float32).attend(key, value, extents, query, 0.1)
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "omp" in line and ".so" in line}
    assert len({path for path in runtimes if "gomp" in path or "iomp" in path}) == 1
