"""Measures of agreement by their definitions, by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from hkvprof.calibration.confidence import cohen_kappa, jaccard, same_share, spearman, wilson
from tests.calibration.made_rows import D, S


def test_wilson_intervals_are_those_of_scipy() -> None:
    for total in (1, 2, 3, 10, 61, 263):
        for count in range(total + 1):
            expected = stats.binomtest(count, total).proportion_ci(method="wilson")
            assert wilson(count, total) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


@given(st.integers(1, 500), st.data())
def test_wilson_intervals_hold_the_share_and_mirror(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    low, high = wilson(count, total)
    assert 0 <= low <= count / total <= high <= 1
    assert wilson(total - count, total) == pytest.approx((1 - high, 1 - low))


def test_kappa_and_jaccard_worked_out_by_hand() -> None:
    first, second = np.array([S, S, D, D]), np.array([S, D, D, D])
    assert same_share(first, second) == 0.75
    assert cohen_kappa(first, second) == pytest.approx(0.5)  # (3/4 - 1/2) / (1 - 1/2)
    assert jaccard(first, second) == 0.5
    assert cohen_kappa(first, 1 - first) == -1
    assert jaccard(first, 1 - first) == 0
    # Cohen 1960, table 1, cut to two categories: 25 + 15 of 50 equal; 0.5 and 0.6 "yes".
    yes = np.repeat([[0, 0], [0, 1], [1, 0], [1, 1]], [20, 5, 10, 15], axis=0)
    assert cohen_kappa(yes[:, 0], yes[:, 1]) == pytest.approx(0.4)


PAIRS = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 1), min_size=n, max_size=n)] * 2)
)


@given(PAIRS)
def test_kappa_and_jaccard_by_counting(pair: tuple[list[int], list[int]]) -> None:
    first, second = map(np.array, pair)
    table = [[sum((a, b) == (i, j) for a, b in zip(*pair, strict=True)) for j in (0, 1)]
             for i in (0, 1)]  # fmt: skip
    n = len(first)
    rows, columns = [sum(row) for row in table], [sum(row[j] for row in table) for j in (0, 1)]
    expected = sum(rows[i] * columns[i] for i in (0, 1)) / n**2
    if expected < 1:
        observed = (table[0][0] + table[1][1]) / n
        assert cohen_kappa(first, second) == pytest.approx((observed - expected) / (1 - expected))
    else:
        assert cohen_kappa(first, second) == 1
    sets = [{i for i, kind in enumerate(kinds) if kind == S} for kinds in pair]
    union = sets[0] | sets[1]
    assert jaccard(first, second) == (len(sets[0] & sets[1]) / len(union) if union else 1)
    assert cohen_kappa(first, second) == pytest.approx(cohen_kappa(second, first))


@given(
    st.integers(2, 30).flatmap(
        lambda n: st.tuples(*[st.lists(st.integers(-5, 5), min_size=n, max_size=n)] * 2)
    )
)
def test_spearman_is_that_of_scipy(pair: tuple[list[int], list[int]]) -> None:
    first, second = map(np.array, pair)
    assume(len(set(pair[0])) > 1)
    assume(len(set(pair[1])) > 1)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second)[0], abs=1e-12)


def test_spearman_without_spread_is_defined() -> None:
    flat, rising = np.full(4, 2.0), np.arange(4.0)
    assert spearman(flat, flat + 1) == 1
    assert spearman(flat, rising) == spearman(rising, flat) == 0
    assert spearman(rising[:1], rising[:1]) == 1
