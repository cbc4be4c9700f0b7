"""Drift of one layer against sets written out by hand, and by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.calibration.attention import SHARE, Phase, compared, layer_drift
from hkvprof.heads import KeepRule


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens_kept(
    phase: Phase, head: int, key: Tensor, tokens: int, scaling: float, keep: KeepRule
) -> set[int]:
    """The top SHARE between sinks and recent tokens by the largest weight over rows, float64."""
    best = torch.zeros(tokens, dtype=torch.float64)
    for number, row in enumerate(phase.rows.tolist()):
        logits = scaling * (key[: row + 1].double() @ phase.query[head, number].double())
        weight = logits.softmax(dim=0)[:tokens]
        best[: len(weight)] = torch.maximum(best[: len(weight)], weight)
    middle = range(keep.sinks, tokens - keep.recent)
    order = sorted(middle, key=lambda token: -float(best[token]))
    return set(order[: math.ceil(SHARE * len(middle))])


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(20, 120),
    counts=st.tuples(st.integers(1, 5), st.integers(0, 6), st.integers(0, 4)),
    group=st.integers(1, 3),
)
def test_overlaps_equal_brute_force(
    seed: int, tokens: int, counts: tuple[int, int, int], group: int
) -> None:
    keep, heads, new = KeepRule(sinks=2, recent=4), 2 * group, 12
    key = random(2, tokens + new, 8, seed=seed)
    ends = (tokens, tokens + 6, tokens + new)
    phases = [
        Phase(random(heads, count, 8, seed=seed + i), torch.arange(end - count, end))
        for i, (count, end) in enumerate(zip(counts, ends, strict=True), start=1)
    ]
    found = layer_drift(phases, key, tokens, 0.7, keep)
    there = [bool(count) for count in counts]
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert compared(phases).tolist() == [there[a] and there[b] for a, b in pairs]
    for head in range(heads):
        sets = [tokens_kept(p, head, key[head // group], tokens, 0.7, keep) for p in phases]
        for number, (a, b) in enumerate(pairs):
            both = there[a] and there[b]
            expected = len(sets[a] & sets[b]) / len(sets[a]) if both else 0.0
            assert float(found[number, head]) == pytest.approx(expected), (number, head)


def test_a_head_that_looks_elsewhere_and_one_that_does_not() -> None:
    """Keys are one-hot: rows of the reply look at the window's tokens, or at others; sinks and
    recent tokens, at which all look most, do not count."""
    tokens, keep = 26, KeepRule(sinks=3, recent=3)
    key = torch.eye(30)[None, :28] * 10.0
    window, same, other = (torch.zeros(1, 1, 30) for _ in range(3))
    for query, looked_at in ((window, (5, 6)), (same, (5, 6)), (other, (5, 20))):
        query[..., list(looked_at)] = 2.0
        query[..., [0, 25]] = 9.0
    phases = [
        Phase(torch.cat([window, window]), torch.tensor([25])),
        Phase(torch.cat([same, other]), torch.tensor([26])),
        Phase(torch.zeros(2, 0, 30), torch.tensor([], dtype=torch.long)),
    ]
    found = layer_drift(phases, key, tokens, 1.0, keep)
    assert found.tolist() == [[1.0, 0.5], [0.0, 0.0], [0.0, 0.0]]
    assert compared(phases).tolist() == [True, False, False]
