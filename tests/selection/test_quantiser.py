"""Projections and codebooks from data with known structure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.selection.index import HeadTables, ProjectedIndex
from hkvprof.selection.quantiser import (
    CENTROIDS,
    CHANNELS,
    CODE_UNIT,
    MAX_CHANNELS,
    deal_channels,
    encode,
    fit_codebook,
    fit_projection,
    k_means,
)

SIZES = (16, 32, 64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(data: Tensor) -> Tensor:
    return data.double().T @ data.double() / len(data)


# -- projections ----------------------------------------------------------------------------------


def correlated(dim: int, rows: int = 2000) -> tuple[Tensor, Tensor]:
    """Queries and centred keys with a fast decaying spectrum, in different bases."""
    scale = 3 * 0.8 ** torch.arange(dim)
    bases = [torch.linalg.qr(random(dim, dim, seed=seed)).Q for seed in (1, 2)]
    query, key = ((random(rows, dim, seed=10 + i) * scale) @ basis for i, basis in enumerate(bases))
    return query, key - key.mean(dim=0)


@pytest.mark.parametrize("dim", [8, 32])
def test_projections_keep_the_product_when_nothing_is_quantised(dim: int) -> None:
    query, key = correlated(dim)
    fitted = fit_projection(moment(query), moment(key))
    assert fitted.key_projection.shape == (dim, dim)
    found = (query[:300] @ fitted.query_projection) @ (key[:300] @ fitted.key_projection).T
    exact = query[:300].double() @ key[:300].double().T
    assert torch.allclose(found.double(), exact, atol=2e-3 * float(exact.abs().max()))


def test_wide_heads_keep_the_leading_channels_only() -> None:
    query, key = correlated(64)
    fitted = fit_projection(moment(query), moment(key))
    assert fitted.key_projection.shape == (64, MAX_CHANNELS)
    assert fitted.query_projection.shape == (64, MAX_CHANNELS)


def test_deviation_is_that_of_the_projected_keys_and_falls() -> None:
    query, key = correlated(32)
    fitted = fit_projection(moment(query), moment(key))
    projected = key @ fitted.key_projection
    measured = projected.double().std(dim=0, unbiased=False)
    assert torch.allclose(measured, fitted.deviation.double(), rtol=1e-2, atol=1e-3)
    assert bool((fitted.deviation.diff() <= 1e-6).all())
    correlation = torch.corrcoef(projected[:, :8].T) - torch.eye(8)
    assert float(correlation.abs().max()) < 2e-2


def test_projections_are_those_that_float16_holds() -> None:
    query, key = correlated(16)
    fitted = fit_projection(moment(query), moment(key))
    for array in (fitted.key_projection, fitted.query_projection):
        assert torch.equal(array, array.half().float())


def as_tables(used_moment: Tensor, key: Tensor, bits: int) -> HeadTables:
    """Tables whose channels are in order of their codes."""
    fitted = fit_projection(used_moment, moment(key))
    codebook, owner = fit_codebook(key @ fitted.key_projection, fitted.deviation, bits)
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=bits // 8)).tolist()
    return HeadTables(
        query_projection=fitted.query_projection[:, order],
        key_projection=fitted.key_projection[:, order],
        key_mean=torch.zeros(len(used_moment)),
        codebook=torch.from_numpy(codebook[:, order]) * fitted.deviation[order] * CODE_UNIT,
        subspaces=tuple(itertools.pairwise([0, *ends])),
    )


def test_query_aware_channels_beat_the_plain_eigenvectors_of_keys() -> None:
    """Where queries ignore the directions in which keys vary most (docs/method.md)."""
    dim = 16
    scale = torch.ones(dim)
    scale[:3] = 5.0
    weight = torch.ones(dim)
    weight[:3] = 0.01
    key, query = random(2000, dim, seed=50) * scale, random(200, dim, seed=51) * weight
    errors = []
    for used in (torch.diag(weight**2), torch.eye(dim)):
        logits = ProjectedIndex.build(key, as_tables(used, key, 16)).logits(query)
        errors.append(float(((logits - query @ key.T) ** 2).mean()))
    assert errors[0] < 0.8 * errors[1]


# -- channels of codes ----------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=40), st.sampled_from((2, 4, 8)))
def test_channels_are_dealt_evenly(deviation: list[float], codes: int) -> None:
    owner = deal_channels(deviation, codes)
    counts = [owner.count(code) for code in range(codes)]
    assert len(owner) == sum(counts) == len(deviation)
    assert max(counts) <= -(-len(deviation) // codes)
    if len(deviation) >= 2 * codes - 1:
        assert min(counts) >= 1


def test_products_of_variances_are_alike() -> None:
    deviation = (3 * 0.85 ** np.arange(32)).tolist()
    owner = deal_channels(deviation, 8)
    logs = [
        sum(np.log(sd) for sd, other in zip(deviation, owner, strict=True) if other == code)
        for code in range(8)
    ]
    assert max(logs) - min(logs) < 0.1 * (np.log(deviation[0]) - np.log(deviation[-1]))


# -- codebooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 255, 1000])
def test_few_distinct_points_are_met_exactly(rows: int) -> None:
    distinct = random(min(rows, 40), 3)
    points = distinct.repeat(-(-rows // len(distinct)), 1)[:rows]
    gaps = torch.cdist(points, k_means(points)).amin(dim=1)
    assert float(gaps.max()) < 1e-3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_points_that_are_no_numbers_do_no_harm(bad: float) -> None:
    points = random(500, 2)
    points[7] = bad
    assert bool(k_means(points).isfinite().all())


def test_codebooks_are_the_same_every_time() -> None:
    points, deviation = random(700, 16), torch.ones(16)
    state = torch.random.get_rng_state()
    first, second = (fit_codebook(points, deviation, 32) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("bits", SIZES)
@pytest.mark.parametrize("dim", [3, 8, 20, 32])
def test_shapes_are_those_of_the_format(bits: int, dim: int) -> None:
    codebook, owner = fit_codebook(random(300, dim), torch.ones(dim), bits)
    used = min(CHANNELS[bits], dim)
    assert (codebook.shape, codebook.dtype) == ((CENTROIDS, used), np.int8)
    assert (owner.shape, owner.dtype) == ((used,), np.uint8)
    assert int(owner.max()) < bits // 8
    assert int(codebook.min()) >= -127


def test_a_channel_that_never_varies_gets_zeros() -> None:
    points = random(400, 4)
    points[:, 2] = 0
    deviation = torch.tensor([1.0, 1.0, 0.0, 1.0])
    codebook, owner = fit_codebook(points, deviation, 16)
    assert not codebook[:, 2].any()
    assert codebook[:, [0, 1, 3]].any(axis=0).all()
    assert sorted(owner.tolist()) == [0, 0, 1, 1]


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**20), st.floats(1e-3, 1e3))
def test_more_bits_mean_less_error_at_any_scale(seed: int, scale: float) -> None:
    """Correlated normals of one spectrum, on points that were not fitted."""
    deviation = scale * 0.9 ** torch.arange(24)
    points = random(2500, 24, seed=seed) * deviation
    errors = []
    for bits in SIZES:
        codebook, owner = fit_codebook(points[:2000], deviation, bits)
        used = codebook.shape[1]
        order = np.argsort(owner, kind="stable")
        ends = np.cumsum(np.bincount(owner, minlength=bits // 8)).tolist()
        subspaces = tuple(itertools.pairwise([0, *ends]))
        values = torch.from_numpy(codebook[:, order]) * deviation[:used][order] * CODE_UNIT
        fresh = points[2000:, :used][:, order]
        codes = encode(fresh, values, subspaces).long()
        decoded = torch.cat([values[codes[:, i], a:b] for i, (a, b) in enumerate(subspaces)], dim=1)
        lost = (fresh - decoded).square().sum() + points[2000:, used:].square().sum()
        errors.append(float(lost / points[2000:].square().sum()))
    assert 0.6 > errors[0] > 1.2 * errors[1] > 1.5 * errors[2] > 0
