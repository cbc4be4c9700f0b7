"""Moments over samples, the keys drawn from them, and what is fitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hkvprof.calibration import index_fit as fit
from hkvprof.calibration.index_fit import KeySample, Moments, tables_of_layer
from hkvprof.heads import HeadGrid
from hkvprof.selection.index import ProjectedIndex
from tests.tables import SIZES, fit_arrays

GRID = HeadGrid(layers=2, query_heads=4, kv_heads=2, head_dim=8)
LENGTHS = {"a": 70, "b": 300, "c": 41}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keys_of(name: str) -> Tensor:
    return random(2, LENGTHS[name], 8, seed=ord(name))


def drawn(order: str, most: int = fit.SAMPLED_KEYS) -> Tensor:
    sample = KeySample(most)
    for name in order:
        sample.add(keys_of(name), name)
    return sample.keys


def test_short_samples_are_kept_whole() -> None:
    everything = torch.cat([keys_of(name) for name in "abc"], dim=1).half()
    found = drawn("abc")
    assert found.dtype == torch.float16
    assert found.shape == everything.shape
    assert not torch.equal(found, everything)
    for head in range(2):
        assert sorted(found[head].tolist()) == sorted(everything[head].tolist())


@pytest.mark.parametrize("limit", [50, 4096])
def test_the_order_of_samples_changes_neither_keys_nor_their_order(limit: int) -> None:
    first = drawn("abc", limit)
    assert first.shape[1] == min(limit, 411)
    for order in ("cba", "bca"):
        assert torch.equal(drawn(order, limit), first)


def test_the_draw_is_spread_over_samples_and_positions() -> None:
    sample = KeySample(1000)
    for number in range(4):
        places = torch.arange(2000.0).expand(1, 2000)
        sample.add(torch.stack([torch.full_like(places, number), places], dim=-1), f"s{number}")
    numbers, places = sample.keys[0].double().T
    counts = torch.bincount(numbers.long(), minlength=4)
    assert int(counts.min()) > 180  # of 250 expected, standard deviation 14
    for number in range(4):
        assert float(places[numbers == number].mean()) == pytest.approx(1000, abs=150)


def moments(order: str) -> Moments:
    found = Moments(GRID)
    for name in order:
        for layer in range(2):
            found.add_queries(layer, random(4, 9, 8, seed=layer + ord(name)), 0.3)
            found.add_keys(layer, (layer + 1) * keys_of(name), name)
    return found


def test_fitting_does_not_depend_on_the_order_of_samples() -> None:
    first, second = moments("abc").fit(SIZES), moments("cab").fit(SIZES)
    for name, array in first.tensors().items():
        assert np.array_equal(array, second.tensors()[name]), name


def test_every_head_of_every_layer_gets_its_own_tables() -> None:
    arrays = moments("abc").fit((16, 64))
    assert arrays.sizes == (16, 64)
    assert arrays.key_projection.shape == (2, 2, 8, 8)
    for layer in range(2):
        loaded = tables_of_layer(arrays, layer, torch.device("cpu"))
        assert set(loaded) == {(head, size) for head in range(2) for size in (16, 64)}
        for (head, size), tables in loaded.items():
            keys = (layer + 1) * torch.cat([keys_of(n) for n in "abc"], dim=1)[head]
            assert torch.allclose(tables.key_mean, keys.mean(dim=0), atol=1e-5)
            query = random(20, 8, seed=5)
            exact = query @ (keys - tables.key_mean).T
            gap = ProjectedIndex.build(keys, tables).logits(query) - exact
            lost = float(gap.square().mean() / exact.square().mean())
            assert lost < {16: 0.2, 64: 0.01}[size]


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_a_handful_of_keys_is_enough_to_fit(tokens: int) -> None:
    keys = random(tokens, 8)
    arrays = fit_arrays(random(30, 8, seed=1), keys)
    assert all(np.isfinite(array).all() for array in arrays.tensors().values())


def test_tables_of_a_7b_model_take_four_megabytes() -> None:
    """28 layers with 4 KV heads of width 128, as in Qwen2.5-VL-7B."""
    arrays = fit_arrays(random(200, 128), random(300, 128, seed=1))
    per_head = sum(array.nbytes for array in arrays.tensors().values())
    assert 28 * 4 * per_head <= 4_000_000
