"""Prompt lengths at which curves are kept, and what each sample says about them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.calibration.evidence import LEAST_WEIGHT, MOST, NEAREST, choose_anchors

SEARCH = settings(max_examples=150, deadline=None)
lengths = st.lists(st.integers(1, 2**20), min_size=1, max_size=60)


@given(lengths, st.randoms(use_true_random=False))
@SEARCH
def test_what_holds_for_any_samples(tokens: list[int], random: object) -> None:
    found = choose_anchors(np.array(tokens))
    count = len(found.lengths)
    assert 1 <= count <= MOST
    assert found.lengths.dtype == np.int64
    assert min(tokens) <= found.lengths[0]
    assert found.lengths[-1] <= max(tokens)
    assert (np.diff(found.lengths) > 0).all()
    assert found.weights.shape == (count, len(tokens))
    assert (found.weights >= 0).all()
    np.testing.assert_allclose(found.weights.sum(axis=0), 1, rtol=1e-12)
    assert ((found.weights > 0).sum(axis=0) <= 2).all()
    if count > 1:
        assert found.weights.sum(axis=1).min() >= LEAST_WEIGHT - 1e-6
        assert np.diff(np.log(found.lengths)).min() >= np.log(NEAREST) - 1 / found.lengths[0]
    if max(tokens) < 1.5 * min(tokens):
        assert count == 1
    order = list(range(len(tokens)))
    random.shuffle(order)  # type: ignore[attr-defined]
    again = choose_anchors(np.array(tokens)[order])
    np.testing.assert_array_equal(again.lengths, found.lengths)
    np.testing.assert_array_equal(again.weights, found.weights[:, order])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1000] * 10 + [1400] * 10, [1183]),  # less than a factor of 1.5: one, their mean
        ([1000] * 10 + [2000] * 10, [1000, 2000]),
        ([1000] * 3 + [2000] * 30, [1878]),  # three samples are no anchor
        ([512, 1024, 2048, 4096] * 4, [512, 1024, 2048, 4096]),
        ([512] * 8 + [65536] * 8, [512, 65536]),  # nothing between them
    ],
)
def test_anchors_by_hand(tokens: list[int], expected: list[int]) -> None:
    assert choose_anchors(np.array(tokens)).lengths.tolist() == expected


def test_what_is_linear_in_log_length_is_read_without_bias() -> None:
    tokens = np.random.default_rng(0).integers(1000, 5000, 200)
    found = choose_anchors(tokens)
    assert len(found.lengths) == 3
    value = 3 + 2 * np.log(tokens)
    means = (found.weights * value).sum(axis=1) / found.weights.sum(axis=1)
    np.testing.assert_allclose(means, 3 + 2 * np.log(found.lengths), atol=1e-3)


def test_parts_of_the_samples_speak_for_anchors_that_they_do_not_reach() -> None:
    tokens = np.array([1000] * 4 + [2000] * 4 + [4000] * 4)
    found = choose_anchors(tokens)
    assert found.lengths.tolist() == [1000, 2000, 4000]
    np.testing.assert_array_equal(found.of(np.ones(12, dtype=np.int64)), found.weights)
    alone = np.zeros(12, dtype=np.int64)
    alone[0] = 3
    np.testing.assert_array_equal(found.of(alone), [alone] * 3)
    ends = np.array([1] + [0] * 10 + [1])
    expected = [[1] + [0] * 11, [1] + [0] * 11, [0] * 11 + [1]]
    np.testing.assert_array_equal(found.of(ends), expected)
