"""Text-centric sparsity in Triton against sorted weights in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.selection import sparsity as text_rows
from tests.runtime.kernels.cases import DTYPES
from tests.runtime.kernels.triton_cases import DEVICES, QUIET

pytestmark = [QUIET, pytest.mark.parametrize("device", DEVICES)]


def mass_exactly(
    query: Tensor, key: Tensor, rows: Tensor, scaling: float, counts: Tensor
) -> Tensor:
    """[kappas, query_heads]."""
    group = len(query) // len(key)
    result = torch.zeros(len(counts), len(query), dtype=torch.float64)
    for head in range(len(query)):
        for number, row in enumerate(rows.tolist()):
            seen = key[head // group, : row + 1].double()
            weight = (query[head, number].double() @ seen.T * scaling).softmax(-1)
            largest = weight.sort(descending=True).values.cumsum(-1)
            result[:, head] += largest[counts[:, number] - 1] / len(rows)
    return result


# Two programs of rows and of keys (SPAN is 2048), three query heads of a key head, a width that is
# no power of two.
@example(
    seed=1, dtype=torch.bfloat16, tokens=2049, count=17, group=3, dim=80, sharpness=1.0, bad=True
)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    tokens=st.sampled_from([1, 2, 127, 521]),
    count=st.integers(1, 20),
    group=st.integers(1, 3),
    dim=st.sampled_from([16, 64, 80]),
    sharpness=st.sampled_from([0.1, 1.0, 8.0]),
    bad=st.booleans(),
)
def test_mass_of_the_largest_weights(
    device: str,
    seed: int,
    dtype: torch.dtype,
    tokens: int,
    count: int,
    group: int,
    dim: int,
    sharpness: float,
    bad: bool,
) -> None:
    """From flat to sharp rows; a NaN stays within its query head."""
    from hkvprof.selection.triton_mass import top_mass

    random = torch.Generator().manual_seed(seed)
    key = torch.randn(2, tokens, dim, generator=random).to(dtype)
    query = torch.randn(2 * group, count, dim, generator=random).to(dtype)
    rows = torch.randint(0, tokens, (count,), generator=random).sort().values
    counts = torch.stack([(k * (rows + 1)).ceil().long().clamp(min=1) for k in (0.01, 0.1, 1.0)])
    if bad:
        query[0, 0, 0] = torch.nan
    scaling = sharpness * dim**-0.5
    exact = mass_exactly(query, key, rows, scaling, counts).float()
    place = [tensor.to(device) for tensor in (query, key, rows, counts)]
    got = top_mass(*place[:3], scaling, place[3]).cpu()
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-3, equal_nan=True)


def test_statistics_on_cuda_tensors_use_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(4, 6, 16), torch.randn(2, 90, 16)
    rows = torch.arange(40, 46)
    sorted_ones = text_rows.text_sparsity(query, key, rows, 0.5, (0.1, 0.3))
    assert not text_rows.no_triton()
    if device == "cpu":
        monkeypatch.setattr(Tensor, "is_cuda", True)
    place = [tensor.to(device) for tensor in (query, key, rows)]
    counted = text_rows.text_sparsity(*place, 0.5, (0.1, 0.3)).cpu()
    torch.testing.assert_close(counted, sorted_ones, rtol=0, atol=1e-3)
    assert not torch.equal(counted, sorted_ones)
