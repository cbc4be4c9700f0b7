"""Keys with a bias that turns: what is taken out, what is added back, what an index gains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.calibration.index_fit import Moments, tables_of_layer
from hkvprof.heads import HeadGrid
from hkvprof.selection.index import CHUNK_TOKENS, HeadTables, ProjectedIndex
from hkvprof.selection.rotary import Positions, RotatingBias, RotatingKeys

CPU = torch.device("cpu")
GRID = HeadGrid(layers=1, query_heads=2, kv_heads=1, head_dim=16)
FREQUENCY = (10000.0 ** (-np.arange(7) / 7)).astype(np.float32)
"""Seven of eight possible pairs: the last two channels do not turn."""
AXIS = np.array([0, 1, 2, 0, 1, 2, 2], dtype=np.uint8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_bias(scale: float = 20.0) -> RotatingKeys:
    bias = scale * random(1, 1, 16, seed=3).numpy()
    bias[..., 14:] = 0
    return RotatingKeys(bias, FREQUENCY, AXIS)


def turned(bias: np.ndarray, told: np.ndarray) -> Tensor:
    """R(p) b of every token [tokens, dim], by rotation matrices, in float64."""
    rows = []
    for position in told.T:
        matrix = np.eye(16)
        for j, (w, axis) in enumerate(zip(FREQUENCY, AXIS, strict=True)):
            a = float(position[axis]) * float(w)
            places = np.ix_([j, j + 7], [j, j + 7])
            matrix[places] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
        rows.append(matrix @ bias)
    return torch.from_numpy(np.stack(rows))


@given(seed=st.integers(0, 999), first=st.integers(0, 3000), plain=st.booleans())
def test_what_is_taken_out_is_what_is_added_back(seed: int, first: int, plain: bool) -> None:
    keys, query = random(9, 16, seed=seed), random(2, 3, 16, seed=seed + 1)
    counted = np.tile(np.arange(first, first + 9), (3, 1))
    told = counted if plain else np.random.default_rng(seed).integers(0, 3000, (3, 9))
    positions = Positions.of(torch.from_numpy(told))
    assert (positions.told is None) == plain
    (bias,) = make_bias().heads(0, CPU)
    wanted = turned(make_bias().bias[0, 0].astype(np.float64), told)
    removed = keys - bias.removed(keys, positions)
    torch.testing.assert_close(removed.double(), wanted, rtol=0, atol=2e-2)
    added = bias.logits(query, positions)
    torch.testing.assert_close(added, query @ removed.T, rtol=1e-3, atol=1e-2)
    assert torch.equal(bias.removed(keys, positions.part(0, 9))[:, 14:], keys[:, 14:])


@pytest.mark.parametrize("told", [False, True])
def test_codes_of_infinite_precision_give_the_true_logits(told: bool) -> None:
    """Every key a centroid of its own, all channels in one projection that is the identity."""
    keys, query = random(200, 16, seed=5), random(4, 16, seed=6)
    spots = torch.randint(0, 900, (3, 200), generator=torch.Generator().manual_seed(1))
    positions = Positions(40, 200, spots.int() if told else None)
    (bias,) = make_bias().heads(0, CPU)
    book = torch.zeros(256, 16)
    book[:200] = bias.removed(keys, positions)
    tables = HeadTables(torch.eye(16), torch.eye(16), torch.zeros(16), book, ((0, 16),), bias=bias)
    index = ProjectedIndex.build(keys, tables, positions)
    assert index.codes[:, 0].tolist() == list(range(200))
    torch.testing.assert_close(index.logits(query), query @ keys.T, rtol=1e-4, atol=2e-2)
    grown = ProjectedIndex.build(keys[:150], tables, positions.part(0, 150))
    grown = grown.append(keys[150:, None], positions)
    assert torch.equal(grown.codes, index.codes)
    assert torch.equal(grown.logits(query), index.logits(query))


def test_many_keys_are_encoded_at_their_own_positions() -> None:
    keys = random(CHUNK_TOKENS + 40, 16)
    positions = Positions(7, len(keys))
    tables = fitted(keys, make_bias(), positions)
    whole = ProjectedIndex.build(keys, tables, positions)
    last = ProjectedIndex.build(keys[-60:], tables, positions.part(len(keys) - 60, 60))
    assert torch.equal(whole.codes[-60:], last.codes)


def fitted(keys: Tensor, rotating: RotatingKeys | None, positions: Positions) -> HeadTables:
    """Tables of 32 bits."""
    moments = Moments(GRID, rotating)
    moments.add_queries(0, random(2, 200, 16, seed=8), 1.0)
    moments.add_keys(0, keys[None], "sample", positions)
    return tables_of_layer(moments.fit((32,)), 0, CPU)[0, 32]


@pytest.mark.parametrize("told", [False, True])
def test_an_index_finds_more_when_the_bias_is_turned(told: bool) -> None:
    spots = torch.randint(0, 60, (3, 3000), generator=torch.Generator().manual_seed(2))
    positions = Positions(0, 3000, spots.int() if told else None)
    counted = torch.arange(3000).expand(3, -1) if positions.told is None else positions.told
    keys = random(3000, 16) + turned(make_bias().bias[0, 0], counted.numpy()).float()
    query = random(100, 16, seed=9)
    best = (query @ keys.T).topk(150).indices
    found = []
    for rotating in (None, make_bias()):
        tables = fitted(keys, rotating, positions)
        own = ProjectedIndex.build(keys, tables, positions).logits(query).topk(150).indices
        pairs = zip(own.tolist(), best.tolist(), strict=True)
        found.append(np.mean([len({*a} & {*b}) for a, b in pairs]) / 150)
    assert 1 - found[1] < 0.6 * (1 - found[0])


def test_a_bias_too_small_to_matter_changes_nothing() -> None:
    """Not a bit, and no tensors."""
    keys, positions = random(1, 500, 16), Positions(0, 500)
    made = []
    for rotating in (None, make_bias(0.01)):
        moments = Moments(GRID, rotating)
        moments.add_queries(0, random(2, 200, 16, seed=8), 1.0)
        moments.add_keys(0, keys, "sample", positions)
        made.append(moments.fit((16, 32)).tensors())
    assert made[0].keys() == made[1].keys()
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])


def test_only_large_pairs_are_taken_out() -> None:
    bias = np.zeros((2, 1, 16), dtype=np.float32)
    bias[:, 0, :4] = (1, 3, 0, 2)
    bias[:, 0, 7:11] = (1, 0, 0.5, 2)
    keys = RotatingKeys(bias, FREQUENCY, AXIS).where_larger(1, np.array([8.0]))
    assert np.array_equal(keys.bias[0], bias[0])
    assert keys.bias[1, 0].nonzero()[0].tolist() == [1, 3, 10]
    assert keys.most_pairs == 4
    (head,) = keys.heads(1, CPU)
    assert head.places[:2].tolist()[0][:2] == [1, 3]
    assert head.constants[:2, 2:].count_nonzero() == 0
    none = replace(keys, bias=np.zeros_like(bias))
    assert none.most_pairs == 0
    empty = RotatingBias.load(none.bias[0, 0], FREQUENCY, AXIS, 0, CPU)
    assert torch.equal(empty.removed(random(3, 16), Positions(0, 3)), random(3, 16))
