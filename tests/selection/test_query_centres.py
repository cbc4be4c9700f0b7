"""Calibrated static scores against rotation matrices and softmax in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.calibration.query_fit import QuerySamples, clusters
from hkvprof.heads import HeadGrid
from hkvprof.profile.queries import QueryTables
from hkvprof.selection.rotary import Positions, Turning, turned
from hkvprof.selection.static import QueryCentres

FREQUENCY = (1.0, 0.25, 0.03)
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(position: float, dim: int) -> Tensor:
    """The matrix that turns a column; channels beyond the pairs stay."""
    matrix, pairs = torch.eye(dim, dtype=torch.float64), len(FREQUENCY)
    for j, frequency in enumerate(FREQUENCY):
        cosine, sine = math.cos(position * frequency), math.sin(position * frequency)
        matrix[j, j] = matrix[j + pairs, j + pairs] = cosine
        matrix[j, j + pairs], matrix[j + pairs, j] = -sine, sine
    return matrix


def tables(layers: int, heads: int, count: int, dim: int) -> QueryTables:
    weights = random(layers, heads, count, seed=3).softmax(-1)
    return QueryTables(
        centres=random(layers, heads, count, dim, seed=4).half().numpy(),
        weights=weights.numpy(),
        frequency=np.array(FREQUENCY, dtype=np.float32),
    )


def by_definition(
    arrays: QueryTables, layer: int, query_heads: list[int], keys: Tensor, position: int,
    scaling: float, seen: list[bool],
) -> list[float]:  # fmt: skip
    """The weighted mean over centres, mean over the group, of softmax over the seen keys."""
    total = [0.0] * len(keys)
    for head in query_heads:
        for number, weight in enumerate(arrays.weights[layer, head]):
            centre = torch.from_numpy(arrays.centres[layer, head, number].astype(np.float64))
            query = rotation(position, len(centre)) @ centre
            logits = [scaling * float(query @ key.double()) for key in keys]
            peak = max(x for x, shown in zip(logits, seen, strict=True) if shown)
            each = [
                math.exp(x - peak) if shown else 0.0 for x, shown in zip(logits, seen, strict=True)
            ]
            for token, part in enumerate(each):
                total[token] += float(weight) * part / sum(each) / len(query_heads)
    return total


@pytest.mark.parametrize(("position", "hidden"), [(0, []), (13, []), (900, [0, 3, 10])])
def test_the_score_is_its_definition(position: int, hidden: list[int]) -> None:
    arrays, keys = tables(2, 6, 4, 8), random(2, 11, 8, seed=1)
    seen = [token not in hidden for token in range(11)]
    visible = torch.tensor(seen) if hidden else None
    for head in range(2):
        group = [3 * head, 3 * head + 1, 3 * head + 2]
        centres = QueryCentres.load(arrays, 1, slice(group[0], group[-1] + 1), CPU)
        found = centres.attention(keys[head : head + 1], position, 0.35, visible)
        expected = by_definition(arrays, 1, group, keys[head], position, 0.35, seen)
        assert found[0].tolist() == pytest.approx(expected, abs=1e-6)
        assert float(found.sum()) == pytest.approx(1, abs=1e-5)


@given(st.integers(0, 100_000), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_scores_depend_on_distances_alone(shift: int, seed: int) -> None:
    """Keys and centres that move on together score the same: rotation is relative."""
    arrays, still = tables(1, 2, 3, 8), random(1, 7, 8, seed=seed)
    shift %= 2000  # beyond, float32 angles themselves differ
    frequency = torch.tensor(FREQUENCY)
    centres = QueryCentres.load(arrays, 0, slice(0, 2), CPU)
    places = torch.arange(7)[:, None]
    first = centres.attention(turned(still, places * frequency), 7, 0.5)
    later = centres.attention(turned(still, (places + shift) * frequency), 7 + shift, 0.5)
    torch.testing.assert_close(first, later, rtol=5e-3, atol=1e-5)


def test_turning_back_undoes_the_rotation_on_every_axis() -> None:
    told = torch.tensor([[0, 3, 3, 9], [0, 1, 2, 9], [0, 5, 4, 9]], dtype=torch.int32)
    turning = Turning(np.array(FREQUENCY, np.float32), np.array([0, 1, 2], np.uint8))
    still = random(2, 4, 8)
    angle = torch.stack([told[a].float() * f for a, f in enumerate(FREQUENCY)], dim=1)
    back = turning.undone(turned(still, angle), Positions.of(told))
    torch.testing.assert_close(back, still, rtol=1e-5, atol=1e-6)


def test_the_next_position_follows_the_axis_that_is_ahead() -> None:
    assert Positions(5, 3).next == 8
    told = torch.tensor([[4, 4, 4], [4, 5, 9], [4, 6, 7]], dtype=torch.int32)
    assert Positions.of(told).next == 10
    assert Positions.of(told).part(0, 2).next == 7


def test_clusters_are_the_blobs_that_points_lie_in() -> None:
    middle = 20 * random(2, 5, 6, seed=7)
    points = (middle[:, :, None] + 0.1 * random(2, 5, 40, 6, seed=8)).flatten(1, 2)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(9))
    centres, weights = clusters(points[:, order], 5)
    near = torch.cdist(centres, middle)
    assert near.argmin(dim=2).sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert float(near.amin(dim=2).max()) < 0.2
    torch.testing.assert_close(weights, torch.full((2, 5), 0.2))


def test_points_that_are_all_alike_have_one_cluster() -> None:
    centres, weights = clusters(torch.ones(1, 9, 4), 3)
    assert torch.equal(centres, torch.ones(1, 3, 4))
    assert weights.sum() == 1


def test_queries_are_drawn_whatever_the_order_of_samples() -> None:
    grid = HeadGrid(layers=1, query_heads=2, kv_heads=1, head_dim=8)
    turning = Turning(np.array(FREQUENCY, np.float32), np.zeros(3, np.uint8))
    made = {f"s{i}": (random(2, 400, 8, seed=i), Positions(50 * i, 400)) for i in range(4)}
    fits = []
    for names in (sorted(made), sorted(made, reverse=True)):
        samples = QuerySamples(grid, turning)
        for name in names:
            samples.add(0, *made[name], name)
        fits.append(samples.fit())
    for name, array in fits[0].tensors().items():
        np.testing.assert_array_equal(array, fits[1].tensors()[name])
    fits[0].check(grid)
