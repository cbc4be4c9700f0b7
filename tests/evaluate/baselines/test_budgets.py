"""Dealing out tokens: exact, bounded, in proportion."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.evaluate.baselines.scores import best_of_all, rows, spread


def test_in_proportion_beyond_the_least() -> None:
    assert spread(20, [1, 2, 3], least=2, most=100) == [4, 7, 9]  # 2 + 14/6 * (1, 2, 3)


def test_what_most_turns_away_goes_to_the_others() -> None:
    assert spread(20, [100, 1, 1], least=0, most=10) == [10, 5, 5]


def test_too_little_and_too_much() -> None:
    assert spread(5, [1, 9], least=4, most=9) == [2, 3]
    assert spread(50, [1, 9], least=4, most=9) == [9, 9]
    assert spread(7, [0, 0], least=0, most=9) in ([3, 4], [4, 3])


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    total=st.integers(0, 500),
    least=st.integers(0, 30),
    most=st.integers(1, 60),
)
def test_spread_is_exact_and_bounded(
    weights: list[float], total: int, least: int, most: int
) -> None:
    numbers = spread(total, weights, least, most)
    assert sum(numbers) == min(total, most * len(weights))
    assert all(0 <= number <= most for number in numbers)
    if total >= least * len(weights) and least <= most:
        assert min(numbers) >= least
    order = np.argsort(weights, kind="stable")
    assert all(numbers[a] <= numbers[b] + 1 for a, b in pairwise(order))


def test_rows() -> None:
    assert rows([1, 2, 3, 4, 5, 6], 2) == [[1, 2], [3, 4], [5, 6]]


def test_best_of_all_heads_with_a_safe_one_for_each() -> None:
    score = torch.tensor([[9.0, 8, 7, 6], [1, 5, 2, 3]])
    assert best_of_all(score, 4).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    safe = best_of_all(score, 4, safe=1)
    assert safe.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 1]]


def test_ties_go_to_earlier_tokens() -> None:
    assert best_of_all(torch.ones(2, 3), 4).tolist() == [[True] * 3, [True, False, False]]
