"""Encoding for projected indexes, against distances in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.runtime import kernels
from hkvprof.runtime.kernels.reference import TorchKernels
from tests.runtime.kernels.cases import compiler


@compiler
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([0, 1, 255, 256, 257, 700]),
    widths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    whole=st.booleans(),
)
def test_encoding(seed: int, tokens: int, widths: list[int], whole: bool) -> None:
    """Nearest in float64; small integers make exact ties, which go to the lower number."""
    random = torch.Generator().manual_seed(seed)
    channels = sum(widths)
    if whole:
        points = torch.randint(-1, 2, (tokens, channels), generator=random).float()
        codebook = torch.randint(-1, 2, (256, channels), generator=random).float()
    else:
        points = torch.randn(tokens, channels, generator=random)
        codebook = torch.randn(256, channels, generator=random)
    points[::7] = torch.nan
    points[1::7] = torch.inf
    ends = torch.tensor(widths).cumsum(0).tolist()
    subspaces = tuple(zip([0, *ends[:-1]], ends, strict=True))
    sure = torch.nan_to_num(points, nan=0.0, posinf=0.0).double()
    native = kernels.for_device(torch.device("cpu"), torch.float32)
    for kernel in (TorchKernels(), native):
        codes = kernel.encode(points, codebook, subspaces)
        assert codes.dtype == torch.uint8
        assert codes.shape == (tokens, len(subspaces))
        for number, (first, end) in enumerate(subspaces):
            gap = sure[:, None, first:end] - codebook[:, first:end].double()
            cost = gap.square().sum(-1) / 2
            mine = codes[:, number].long()
            if whole:
                first_best = (cost == cost.amin(1, keepdim=True)).int().argmax(1)
                assert torch.equal(mine, first_best)
            else:
                assert (cost[torch.arange(tokens), mine] <= cost.amin(1) + 1e-5).all()
