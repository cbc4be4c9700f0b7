"""Indexes of dynamic heads against loops and brute-force quantisation."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.heads import HeadType, Strategy
from hkvprof.policy.index import (
    DISTORTION,
    STEP,
    HeadTables,
    MeanIndex,
    MinMaxIndex,
    ProjectedIndex,
    allocate_bits,
    build_index,
    fit_projection,
)

SIZES = (16, 32, 64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dynamic(index: str, chunk: int = 1, bits: int = 0) -> Strategy:
    return Strategy(HeadType.DYNAMIC, index=index, chunk=chunk, bits=bits)


# -- chunk digests --------------------------------------------------------------------------------


def test_mean_logits_are_dot_products_with_the_mean_key() -> None:
    keys, query = random(5, 4, 8), random(3, 2, 8, seed=1)
    found = build_index(dynamic("mean", 4), keys, None).logits(query)
    for item, row, member in itertools.product(range(5), range(3), range(2)):
        mean = [sum(float(keys[item, t, d]) for t in range(4)) / 4 for d in range(8)]
        dot = sum(float(query[row, member, d]) * mean[d] for d in range(8))
        assert float(found[row, member, item]) == pytest.approx(dot, abs=1e-5)


def test_minmax_logits_are_the_larger_product_per_channel() -> None:
    keys, query = random(5, 4, 8), random(3, 8, seed=1)
    found = build_index(dynamic("minmax", 4), keys, None).logits(query)
    for item, row in itertools.product(range(5), range(3)):
        bound = 0.0
        for d in range(8):
            channel = [float(keys[item, t, d]) for t in range(4)]
            bound += max(float(query[row, d]) * min(channel), float(query[row, d]) * max(channel))
        assert float(found[row, item]) == pytest.approx(bound, abs=1e-5)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_minmax_bounds_every_true_logit_of_a_chunk(seed: int, dtype: torch.dtype) -> None:
    keys = (3 * random(6, 8, 16, seed=seed)).to(dtype)
    query = random(4, 16, seed=seed + 1)
    bound = MinMaxIndex.build(keys).logits(query)
    true = torch.einsum("rd,icd->ric", query, keys.float())
    assert bool((bound + 1e-4 >= true.amax(dim=-1)).all())


def test_minmax_is_exact_for_chunks_of_one() -> None:
    keys, query = random(9, 1, 16), random(4, 16, seed=1)
    index = MinMaxIndex.build(keys)
    assert torch.allclose(index.logits(query), query @ keys[:, 0].T, atol=1e-5)


@pytest.mark.parametrize("name", ["mean", "minmax"])
def test_digests_stay_in_the_dtype_of_the_keys(name: str) -> None:
    keys = random(6, 4, 16).bfloat16()
    index = build_index(dynamic(name, 4), keys, None)
    size = sum(t.numel() * t.element_size() for t in index.tensors())
    assert all(t.dtype == torch.bfloat16 for t in index.tensors())
    assert size == 6 * 16 * 2 * {"mean": 1, "minmax": 2}[name]


def test_score_is_the_group_mean_of_softmaxed_logits() -> None:
    index = MeanIndex.build(random(7, 4, 8))
    query = random(3, 2, 8, seed=1).bfloat16()
    found = index.score(query, 0.5)
    for row in range(3):
        per_query = [
            np.exp(0.5 * (index.mean @ query[row, m].float()).double().numpy()) for m in range(2)
        ]
        expected = sum(e / e.sum() for e in per_query) / 2
        assert found[row].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert float(found.sum()) == pytest.approx(3.0, abs=1e-5)


# -- projected index: packing ---------------------------------------------------------------------


def picking_tables(bits: tuple[int, ...], dim: int, seed: int = 0) -> HeadTables:
    """Projections that pick single channels, so that projecting is exact in floating point."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(dim, generator=generator)[: len(bits)]
    pick = torch.zeros(dim, len(bits))
    pick[order, torch.arange(len(bits))] = 1
    return HeadTables(
        key_projection=pick,
        query_projection=random(dim, len(bits), seed=seed + 1),
        key_mean=random(dim, seed=seed + 2),
        deviation=torch.rand(len(bits), generator=generator) + 0.1,
        bits=bits,
    )


def quantise(keys: Tensor, tables: HeadTables) -> np.ndarray:
    """Centre of the quantisation cell of every stored channel, one number at a time."""
    centred = (keys.float() - tables.key_mean).numpy()
    rows = []
    for key in centred:
        row = []
        for channel, width in enumerate(tables.bits):
            if not width:
                continue
            source = int(tables.key_projection[:, channel].argmax())
            step = np.float32(tables.deviation[channel]) * np.float32(STEP[width])
            cell = int(np.floor(key[source] / step))
            cell = min(max(cell, -(2 ** (width - 1))), 2 ** (width - 1) - 1)
            row.append((cell + 0.5) * float(step))
        rows.append(row)
    return np.array(rows)


@st.composite
def channel_bits(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    """A word size, and bits per channel (zeros among them) that fill it as far as drawn."""
    size = draw(st.sampled_from(SIZES))
    widths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=32))
    kept, left = [], size
    for width in widths:
        kept.append(min(width, left))
        left -= kept[-1]
    return size, tuple(kept)


@settings(deadline=None)
@given(channel_bits(), st.integers(0, 2**20))
def test_packed_words_decode_to_the_quantised_projections(
    size_and_bits: tuple[int, tuple[int, ...]], seed: int
) -> None:
    size, bits = size_and_bits
    tables = picking_tables(bits, 32, seed)
    keys = 2 * random(20, 32, seed=seed + 3)
    index = ProjectedIndex.build(keys, tables, size)
    assert index.words.element_size() * 8 == size
    decoded = index.decode().numpy()
    expected = quantise(keys, tables)
    assert decoded.shape == (20, sum(b > 0 for b in bits))
    assert decoded == pytest.approx(expected.reshape(decoded.shape), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_a_full_word_uses_its_sign_bit(size: int) -> None:
    """Codes of the last channel reach the top bit: half of the words are negative integers."""
    count = size // 4
    tables = picking_tables((4,) * count, 32)
    keys = 2 * random(64, 32, seed=5)
    index = ProjectedIndex.build(keys, tables, size)
    last_is_high = index.decode()[:, -1] > 0
    assert torch.equal(index.words < 0, last_is_high)
    assert 5 < int(last_is_high.sum()) < 59
    assert index.decode().numpy() == pytest.approx(quantise(keys, tables), rel=1e-5)


def test_logits_skip_channels_that_are_not_stored() -> None:
    tables = picking_tables((5, 0, 3, 0, 2), 8)
    keys, query = random(12, 8, seed=7), random(3, 2, 8, seed=8)
    found = ProjectedIndex.build(keys, tables, 16).logits(query)
    stored = torch.tensor(quantise(keys, tables)).float()
    expected = (query @ tables.query_projection[:, [0, 2, 4]]) @ stored.T
    assert torch.allclose(found, expected, atol=1e-4)


def test_nan_and_infinite_keys_leave_other_items_alone() -> None:
    tables = picking_tables((4, 4, 4, 4), 8)
    keys = random(10, 8, seed=9)
    clean = ProjectedIndex.build(keys, tables, 16).words
    keys[3] = torch.nan
    keys[6] = torch.inf
    index = ProjectedIndex.build(keys, tables, 16)
    others = [i for i in range(10) if i not in (3, 6)]
    assert torch.equal(index.words[others], clean[others])
    assert bool(index.decode().isfinite().all())


@pytest.mark.parametrize("size", SIZES)
def test_a_head_of_constant_keys_gets_equal_scores(size: int) -> None:
    """No channel varies, so none gets bits: every item looks the same."""
    fitted = fit_projection(torch.eye(8), torch.zeros(8, 8), (size,))
    assert fitted.bits[size] == (0,) * 8
    tables = HeadTables(
        fitted.key_projection, fitted.query_projection, torch.ones(8), fitted.deviation,
        fitted.bits[size],
    )  # fmt: skip
    index = ProjectedIndex.build(torch.ones(5, 8), tables, size)
    assert torch.equal(index.logits(random(2, 8)), torch.zeros(2, 5))
    assert torch.allclose(index.score(random(3, 2, 8), 0.3), torch.full((3, 5), 0.2))


# -- projected index: fitting ---------------------------------------------------------------------


@dataclass(frozen=True)
class Correlated:
    """Queries and keys with a fast decaying spectrum, in different bases."""

    query: Tensor
    key: Tensor
    mean: Tensor

    @classmethod
    def draw(cls, rows: int, dim: int, seed: int) -> Correlated:
        scale = 3 * 0.8 ** torch.arange(dim)
        key_basis = torch.linalg.qr(random(dim, dim, seed=1)).Q
        query_basis = torch.linalg.qr(random(dim, dim, seed=2)).Q
        mean = 2 * random(dim, seed=3)
        return cls(
            query=(random(rows, dim, seed=seed) * scale) @ query_basis,
            key=(random(rows, dim, seed=seed + 1) * scale) @ key_basis + mean,
            mean=mean,
        )

    def fit(self, sizes: tuple[int, ...] = SIZES) -> dict[int, HeadTables]:
        mean = self.key.mean(dim=0)
        centred = (self.key - mean).double()
        query = self.query.double()
        fitted = fit_projection(
            query.T @ query / len(query), centred.T @ centred / len(centred), sizes
        )
        return {
            size: HeadTables(
                fitted.key_projection, fitted.query_projection, mean, fitted.deviation,
                fitted.bits[size],
            )
            for size in sizes
        }  # fmt: skip


@pytest.mark.parametrize("dim", [8, 32, 40])
def test_projections_keep_the_product_when_nothing_is_quantised(dim: int) -> None:
    data = Correlated.draw(500, dim, seed=10)
    tables = data.fit()[64]
    assert tables.key_projection.shape == (dim, dim)
    centred = data.key - tables.key_mean
    found = (data.query @ tables.query_projection) @ (centred @ tables.key_projection).T
    exact = data.query.double() @ centred.double().T
    assert torch.allclose(found.double(), exact, atol=1e-4 * float(exact.abs().max()))


def test_wide_heads_keep_the_leading_channels_only() -> None:
    tables = Correlated.draw(500, 64, seed=10).fit()[32]
    assert tables.key_projection.shape == (64, 40)
    assert tables.query_projection.shape == (64, 40)


def test_deviation_is_that_of_the_projected_keys_and_falls() -> None:
    data = Correlated.draw(2000, 32, seed=20)
    tables = data.fit()[32]
    projected = (data.key - tables.key_mean) @ tables.key_projection
    measured = projected.double().std(dim=0, unbiased=False)
    assert torch.allclose(measured, tables.deviation.double(), rtol=1e-3, atol=1e-4)
    assert bool((tables.deviation.diff() <= 1e-6).all())
    # Channels are uncorrelated: what quantises them one by one loses nothing to correlation.
    correlation = torch.corrcoef(projected[:, :8].T) - torch.eye(8)
    assert float(correlation.abs().max()) < 1e-3


def test_more_bits_mean_smaller_errors_and_better_recall() -> None:
    tables = Correlated.draw(3000, 32, seed=30).fit()
    fresh = Correlated.draw(400, 32, seed=40)
    true = fresh.query @ (fresh.key - fresh.mean).T
    errors, recalls = [], []
    for size in SIZES:
        logits = ProjectedIndex.build(fresh.key, tables[size], size).logits(fresh.query)
        gap = (logits - true) - (logits - true).mean(dim=1, keepdim=True)
        errors.append(float((gap**2).mean() / true.var()))
        hits = [
            len(set(a.tolist()) & set(b.tolist()))
            for a, b in zip(logits.topk(40).indices, true.topk(40).indices, strict=True)
        ]
        recalls.append(sum(hits) / (40 * len(hits)))
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert recalls[0] < recalls[1] < recalls[2]
    assert recalls[0] > 0.5  # a random choice of 40 of 400 recalls 0.1
    assert recalls[2] > 0.85


def test_query_aware_channels_beat_the_plain_eigenvectors_of_keys() -> None:
    """Where queries ignore the directions in which keys vary most (docs/method.md)."""
    dim = 16
    scale = torch.ones(dim)
    scale[:3] = 5.0
    weight = torch.ones(dim)
    weight[:3] = 0.01
    key, query = random(2000, dim, seed=50) * scale, random(2000, dim, seed=51) * weight
    moment, covariance = torch.diag(weight**2), torch.diag(scale**2)
    errors = []
    for used in (moment, torch.eye(dim)):
        fitted = fit_projection(used, covariance, (16,))
        tables = HeadTables(
            fitted.key_projection, fitted.query_projection, torch.zeros(dim), fitted.deviation,
            fitted.bits[16],
        )  # fmt: skip
        logits = ProjectedIndex.build(key, tables, 16).logits(query[:200])
        errors.append(float(((logits - query[:200] @ key.T) ** 2).mean()))
    assert errors[0] < 0.8 * errors[1]


# -- bits -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=40), st.sampled_from(SIZES))
def test_bits_fit_the_word(deviation: list[float], total: int) -> None:
    bits = allocate_bits(deviation, total)
    assert len(bits) == len(deviation)
    assert sum(bits) <= total
    assert all(0 <= b <= 5 for b in bits)
    varied = [sd for sd in deviation if sd > 1e-3]
    if len(varied) == len(deviation):
        assert sum(bits) == min(total, 5 * len(deviation))
    assert all(b == 0 for sd, b in zip(deviation, bits, strict=True) if sd == 0)


def distortion(deviation: list[float], bits: tuple[int, ...]) -> float:
    return sum(sd * sd * DISTORTION[b] for sd, b in zip(deviation, bits, strict=True))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=3), st.integers(0, 9))
def test_greedy_bits_are_the_best_bits(deviation: list[float], total: int) -> None:
    best = min(
        distortion(deviation, bits)
        for bits in itertools.product(range(6), repeat=len(deviation))
        if sum(bits) <= total
    )
    assert distortion(deviation, allocate_bits(deviation, total)) == pytest.approx(best, rel=1e-9)


def test_step_and_distortion_are_those_of_a_unit_normal() -> None:
    """Measure the quantiser that the code uses on a fine grid of the normal density."""
    x = np.linspace(-8, 8, 200_001)
    density = np.exp(-(x**2) / 2)
    density /= density.sum()
    for bits in range(1, 6):
        half = 2 ** (bits - 1)

        def error(step: float, half: int = half) -> float:
            cell = np.clip(np.floor(x / step), -half, half - 1)
            return float((density * (x - (cell + 0.5) * step) ** 2).sum())

        assert error(STEP[bits]) == pytest.approx(DISTORTION[bits], rel=0.02)
        assert error(STEP[bits]) <= min(error(0.97 * STEP[bits]), error(1.03 * STEP[bits]))


# -- loading from a profile -----------------------------------------------------------------------


@dataclass(frozen=True)
class Arrays:
    """The arrays of a profile with one layer and two heads."""

    sizes: tuple[int, ...]
    key_projection: np.ndarray
    query_projection: np.ndarray
    key_mean: np.ndarray
    deviation: np.ndarray
    bits: np.ndarray


def test_loading_drops_channels_without_bits_and_changes_no_score() -> None:
    rng = np.random.default_rng(0)
    bits = np.zeros((2, 1, 2, 6), dtype=np.uint8)
    bits[0, 0, 1] = (5, 0, 4, 0, 0, 1)
    bits[1, 0, 1] = (5, 5, 5, 4, 0, 3)
    arrays = Arrays(
        sizes=(16, 32),
        key_projection=rng.normal(size=(1, 2, 8, 6)).astype(np.float16),
        query_projection=rng.normal(size=(1, 2, 8, 6)).astype(np.float16),
        key_mean=rng.normal(size=(1, 2, 8)).astype(np.float32),
        deviation=rng.uniform(0.5, 2, size=(1, 2, 6)).astype(np.float32),
        bits=bits,
    )
    keys, query = random(30, 8, seed=1), random(4, 8, seed=2)
    for place, (size, used) in enumerate([(16, [0, 2, 5]), (32, [0, 1, 2, 3, 5])]):
        loaded = HeadTables.load(arrays, 0, 1, size, torch.device("cpu"))
        assert loaded.bits == tuple(int(b) for b in bits[place, 0, 1, used])
        assert loaded.key_projection.dtype == torch.float32
        assert loaded.key_projection.tolist() == arrays.key_projection[0, 1][:, used].tolist()
        assert loaded.query_projection.tolist() == arrays.query_projection[0, 1][:, used].tolist()
        assert loaded.deviation.tolist() == arrays.deviation[0, 1][used].tolist()
        assert loaded.key_mean.tolist() == arrays.key_mean[0, 1].tolist()
        whole = HeadTables(
            torch.from_numpy(arrays.key_projection[0, 1].astype(np.float32)),
            torch.from_numpy(arrays.query_projection[0, 1].astype(np.float32)),
            loaded.key_mean,
            torch.from_numpy(arrays.deviation[0, 1]),
            tuple(bits[place, 0, 1].tolist()),
        )
        ours, theirs = (ProjectedIndex.build(keys, t, size) for t in (loaded, whole))
        assert torch.equal(ours.words, theirs.words)
        assert torch.allclose(ours.logits(query), theirs.logits(query), atol=1e-5)
