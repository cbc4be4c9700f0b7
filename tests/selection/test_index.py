"""Indexes of dynamic heads against loops and brute force."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.heads import HeadType, Strategy
from hkvprof.profile.costs import index_item_bytes
from hkvprof.selection import index as module
from hkvprof.selection.index import (
    HeadTables,
    KeyIndex,
    MeanIndex,
    MinMaxIndex,
    ProjectedIndex,
    Ranking,
    build_index,
)
from hkvprof.selection.quantiser import CODE_UNIT
from tests.tables import SIZES, fit_tables


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


# -- any index ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "minmax", "projected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_appending_is_building_on_everything(name: str, dtype: torch.dtype) -> None:
    chunk = 1 if name == "projected" else 4
    strategy = dynamic(name, chunk, 32)
    tables = make_tables((2, 0, 3, 1), 16) if name == "projected" else None
    keys, query = (2 * random(20, chunk, 16)).to(dtype), random(3, 2, 16, seed=1)
    whole = build_index(strategy, keys, tables)
    grown: KeyIndex = build_index(strategy, keys[:7], tables)
    first = grown
    for start, end in ((7, 8), (8, 8), (8, 20)):
        grown = grown.append(keys[start:end])
    assert (first.items, grown.items, whole.items) == (7, 20, 20)
    assert type(grown) is type(whole)
    for ours, theirs in zip(grown.tensors(), whole.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(grown.logits(query), whole.logits(query))
    assert torch.equal(first.logits(query), build_index(strategy, keys[:7], tables).logits(query))


@pytest.mark.parametrize("name", ["mean", "minmax", "projected"])
def test_an_index_holds_the_bytes_that_its_plan_counts(name: str) -> None:
    strategy = dynamic(name, 1, 64)
    tables = make_tables((1,) * 8, 16)
    index = build_index(strategy, random(30, 1, 16).half(), tables)
    held = sum(tensor.untyped_storage().nbytes() for tensor in index.tensors())
    assert held == index.items * index_item_bytes(strategy, 16, itemsize=2)


# -- projected index ------------------------------------------------------------------------------


def make_tables(widths: tuple[int, ...], dim: int, seed: int = 0) -> HeadTables:
    """Random tables whose codes own so many channels each."""
    channels = sum(widths)
    return HeadTables(
        query_projection=random(dim, channels, seed=seed + 1),
        key_projection=random(dim, channels, seed=seed + 2),
        key_mean=random(dim, seed=seed + 3),
        codebook=3 * random(256, channels, seed=seed + 4),
        subspaces=tuple(pairwise([0, *np.cumsum(widths).tolist()])),
    )


def decoded(index: ProjectedIndex) -> Tensor:
    """The centroids that the codes name, [items, channels], one at a time."""
    tables = index.tables
    rows = torch.zeros(index.items, tables.codebook.shape[1])
    for item, code in itertools.product(range(index.items), range(len(tables.subspaces))):
        first, end = tables.subspaces[code]
        rows[item, first:end] = tables.codebook[int(index.codes[item, code]), first:end]
    return rows


@st.composite
def channels_of_codes(draw: st.DrawFn) -> tuple[int, ...]:
    """Channels of each of 2, 4 or 8 codes, one at least in all."""
    size = draw(st.sampled_from(SIZES))
    widths = draw(st.lists(st.integers(0, 4), min_size=size // 8, max_size=size // 8))
    return tuple(widths) if any(widths) else (1, *widths[1:])


@settings(deadline=None, max_examples=40)
@given(channels_of_codes(), st.integers(0, 2**20))
def test_logits_are_products_with_the_decoded_keys(widths: tuple[int, ...], seed: int) -> None:
    tables = make_tables(widths, 16, seed)
    index = ProjectedIndex.build(random(20, 16, seed=seed + 9), tables)
    assert index.codes.dtype == torch.uint8
    assert index.codes.shape == (20, len(widths))
    query = random(3, 2, 16, seed=seed + 10)
    expected = (query @ tables.query_projection) @ decoded(index).T
    found = index.logits(query)
    assert found.shape == (3, 2, 20)
    assert torch.allclose(found, expected, atol=1e-3)
    assert torch.allclose(index.logits(query[0, 0]), expected[0, 0], atol=1e-3)
    table = index.lut(query)
    assert table.shape == (3, 2, len(widths), 256)
    for code, width in enumerate(widths):
        assert width or not bool(table[..., code, :].any())
        assert width or not bool(index.codes[:, code].any())


@settings(deadline=None, max_examples=20)
@given(channels_of_codes(), st.integers(0, 2**20))
def test_codes_name_the_nearest_centroid(widths: tuple[int, ...], seed: int) -> None:
    tables = make_tables(widths, 16, seed)
    keys = 2 * random(30, 16, seed=seed + 9)
    index = ProjectedIndex.build(keys, tables)
    projected = ((keys - tables.key_mean) @ tables.key_projection).double()
    for code, (first, end) in enumerate(tables.subspaces):
        centroids = tables.codebook[:, first:end].double()
        distance = (projected[:, None, first:end] - centroids).square().sum(dim=-1)
        chosen = distance.gather(1, index.codes[:, code : code + 1].long())[:, 0]
        assert torch.allclose(chosen, distance.amin(dim=1), rtol=1e-3, atol=1e-3)


def test_long_prompts_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, keys = make_tables((2, 2, 2, 2), 16), random(100, 16, seed=3)
    whole = ProjectedIndex.build(keys, tables)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 7)
    parts = ProjectedIndex.build(keys, tables)
    assert torch.equal(whole.codes, parts.codes)
    assert parts.codes.untyped_storage().nbytes() == 400


def test_the_order_of_keys_does_not_matter() -> None:
    tables, keys = make_tables((2, 3), 16), random(50, 16, seed=3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    codes = ProjectedIndex.build(keys, tables).codes
    assert torch.equal(ProjectedIndex.build(keys[order], tables).codes, codes[order])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_keys_that_are_no_numbers_leave_other_items_alone(value: float) -> None:
    tables, query = make_tables((2, 1, 0, 3), 8), random(4, 8, seed=8)
    keys = random(10, 8, seed=9)
    clean = ProjectedIndex.build(keys, tables)
    keys[3] = value
    keys[6, 2] = value
    index = ProjectedIndex.build(keys, tables)
    others = [i for i in range(10) if i not in (3, 6)]
    assert torch.equal(index.codes[others], clean.codes[others])
    assert bool(index.logits(query).isfinite().all())


def test_an_index_without_items_can_grow() -> None:
    tables = make_tables((2, 2), 8)
    empty = ProjectedIndex.build(torch.empty(0, 8), tables)
    assert empty.logits(random(3, 8)).shape == (3, 0)
    keys = random(5, 1, 8)
    codes = ProjectedIndex.build(keys[:, 0], tables).codes
    assert torch.equal(empty.append(keys).codes, codes)


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


@pytest.mark.parametrize("dim", [32, 64])
def test_more_bits_mean_smaller_errors_and_better_recall(dim: int) -> None:
    data = Correlated.draw(4000, dim, seed=30)
    tables = fit_tables(data.query, data.key)
    fresh = Correlated.draw(400, dim, seed=40)
    true = fresh.query @ (fresh.key - fresh.mean).T
    errors, recalls = [], []
    for size in SIZES:
        logits = ProjectedIndex.build(fresh.key, tables[size]).logits(fresh.query)
        gap = (logits - true) - (logits - true).mean(dim=1, keepdim=True)
        errors.append(float((gap**2).mean() / true.var()))
        hits = [
            len(set(a.tolist()) & set(b.tolist()))
            for a, b in zip(logits.topk(40).indices, true.topk(40).indices, strict=True)
        ]
        recalls.append(sum(hits) / (40 * len(hits)))
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert recalls[0] < recalls[1] < recalls[2]
    assert recalls[0] > 0.6  # a random choice of 40 of 400 recalls 0.1
    assert recalls[2] > 0.9


@pytest.mark.parametrize("size", SIZES)
def test_a_head_of_constant_keys_gets_equal_scores(size: int) -> None:
    tables = fit_tables(random(50, 8), torch.ones(40, 8), (size,))[size]
    index = ProjectedIndex.build(torch.ones(5, 8), tables)
    assert torch.equal(index.logits(random(2, 8)), torch.zeros(2, 5))
    assert torch.allclose(index.score(random(3, 2, 8), 0.3), torch.full((3, 5), 0.2))


# -- loading from a profile -----------------------------------------------------------------------


@dataclass(frozen=True)
class Arrays:
    """The arrays of a profile with one layer and two heads."""

    sizes: tuple[int, ...]
    key_projection: np.ndarray
    query_projection: np.ndarray
    key_mean: np.ndarray
    deviation: np.ndarray
    codebooks: tuple[np.ndarray, ...]
    subspaces: tuple[np.ndarray, ...]
    key_bias: None = None
    frequency: None = None
    axis: None = None


def make_arrays() -> Arrays:
    """Six channels, of which 16 bits describe four and 32 bits all; a code without channels."""
    rng = np.random.default_rng(0)
    owners = np.zeros((1, 2, 4), np.uint8), np.zeros((1, 2, 6), np.uint8)
    owners[0][0, 1] = (1, 0, 1, 0)
    owners[1][0, 1] = (3, 1, 0, 3, 0, 1)
    return Arrays(
        sizes=(16, 32),
        key_projection=rng.normal(size=(1, 2, 8, 6)).astype(np.float16),
        query_projection=rng.normal(size=(1, 2, 8, 6)).astype(np.float16),
        key_mean=rng.normal(size=(1, 2, 8)).astype(np.float32),
        deviation=rng.uniform(0.5, 2, size=(1, 2, 6)).astype(np.float32),
        codebooks=tuple(
            rng.integers(-127, 128, size=(1, 2, 256, c)).astype(np.int8) for c in (4, 6)
        ),
        subspaces=owners,
    )


def test_loading_brings_the_channels_of_a_code_together() -> None:
    arrays = make_arrays()
    expected = {
        16: ([1, 3, 0, 2], ((0, 2), (2, 4))),
        32: ([2, 4, 1, 5, 0, 3], ((0, 2), (2, 4), (4, 4), (4, 6))),
    }
    for place, (size, (order, subspaces)) in enumerate(expected.items()):
        tables = HeadTables.load(arrays, 0, 1, size, torch.device("cpu"))
        assert tables.subspaces == subspaces
        assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tables.tensors())
        assert tables.key_projection.tolist() == arrays.key_projection[0, 1][:, order].tolist()
        assert tables.query_projection.tolist() == arrays.query_projection[0, 1][:, order].tolist()
        assert tables.key_mean.tolist() == arrays.key_mean[0, 1].tolist()
        unit = arrays.deviation[0, 1].astype(np.float64) * CODE_UNIT
        values = arrays.codebooks[place][0, 1][:, order] * unit[order]
        assert tables.codebook.numpy() == pytest.approx(values, rel=1e-6)
        held = sum(t.untyped_storage().nbytes() for t in tables.tensors())
        assert held == 4 * (2 * 8 * len(order) + 8 + 256 * len(order))


def test_the_order_of_stored_channels_changes_no_score() -> None:
    arrays = make_arrays()
    order = [4, 2, 0, 5, 3, 1]
    shuffled = replace(
        arrays,
        sizes=(32,),
        key_projection=arrays.key_projection[..., order],
        query_projection=arrays.query_projection[..., order],
        deviation=arrays.deviation[..., order],
        codebooks=(arrays.codebooks[1][..., order],),
        subspaces=(arrays.subspaces[1][..., order],),
    )
    keys, query = random(30, 8, seed=1), random(4, 8, seed=2)
    ours, theirs = (
        ProjectedIndex.build(keys, HeadTables.load(a, 0, 1, 32, torch.device("cpu")))
        for a in (arrays, shuffled)
    )
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.allclose(ours.logits(query), theirs.logits(query), atol=1e-4)


# -- reranking ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    items=st.integers(2, 60),
    hot=st.integers(1, 59),
    more=st.integers(0, 70),
    seed=st.integers(0, 99),
)
def test_ranking_equals_its_definition(items: int, hot: int, more: int, seed: int) -> None:
    hot = min(hot, items)
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(5, items, generator=generator)
    logits = 4 * torch.randn(5, 3, items, generator=generator)
    got = Ranking(score, logits).best(hot, more)
    for row in range(5):
        named = score[row].topk(min(items, hot + more)).indices
        exact = logits[row][:, named].double().softmax(dim=-1).mean(dim=0)
        expected = named[exact.topk(hot).indices] if more else named[:hot]
        assert set(got[row].tolist()) == set(expected.tolist())


def test_ranking_without_reranking_needs_no_logits() -> None:
    score = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert Ranking(score, None).best(2, 0).tolist() == [[1, 3]]
