"""What single samples show, merged: by hand, in any order, with pairs that are not there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hkvprof.calibration.attention import mean_statistics
from hkvprof.calibration.merge import build_profile
from hkvprof.errors import ProfileError
from tests.calibration.made_rows import CONDITIONS, GRID, RECIPE, make_rows, make_statistics


def test_means_and_deviations_over_samples() -> None:
    rows = [make_statistics(seed) for seed in range(5)]
    found = mean_statistics(rows)
    found.check(GRID)
    for name in ("modality_mass", "entropy"):
        values = np.stack([getattr(row, name) for row in rows]).astype(np.float64)
        np.testing.assert_allclose(getattr(found, f"{name}_mean"), values.mean(0), atol=1e-7)
        np.testing.assert_allclose(getattr(found, f"{name}_std"), values.std(0), atol=1e-7)


def test_drift_is_averaged_over_the_samples_that_have_the_pair() -> None:
    having = [(1, 1, 1), (1, 0, 0), (0, 0, 0), (1, 1, 0)]
    rows = [make_statistics(seed, there) for seed, there in enumerate(having)]
    found = mean_statistics(rows)
    found.check(GRID)
    assert found.drift_samples.tolist() == [3, 2, 1]
    expected = [
        np.mean([rows[i].drift[pair] for i in who], axis=0)
        for pair, who in enumerate([(0, 1, 3), (0, 3), (0,)])
    ]
    np.testing.assert_allclose(found.drift_mean, expected, atol=1e-7)
    none = mean_statistics([make_statistics(0, (0, 0, 0))])
    assert none.drift_samples.tolist() == [0, 0, 0]
    assert not none.drift_mean.any()


def test_a_profile_holds_them_whatever_the_order_of_rows() -> None:
    rows = make_rows({"a": 2, "b": 1})
    one, other = (build_profile(CONDITIONS, r, None, RECIPE) for r in (rows, rows[::-1]))
    assert one.to_bytes() == other.to_bytes()
    assert one.statistics is not None
    expected = mean_statistics([row.statistics for row in rows])
    np.testing.assert_array_equal(one.statistics.drift_mean, expected.drift_mean)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("entropy", np.float32(1.5), "outside"),
        ("entropy", np.float32("nan"), "NaN"),
        ("drift", np.float32(-0.5), "outside"),
        ("modality_mass", np.float32(0.9), "sum to 1"),
        ("compared", np.uint8(2), "more than 1"),
    ],
)
def test_what_cannot_be_is_refused(name: str, value: np.generic, reason: str) -> None:
    sound = make_statistics()
    sound.check(GRID)
    wrong = getattr(sound, name).copy()
    wrong.flat[0] = value
    with pytest.raises(ProfileError, match=reason):
        replace(sound, **{name: wrong}).check(GRID)
    with pytest.raises(ProfileError, match=f"{name} should be"):
        replace(sound, **{name: wrong[..., :1]}).check(GRID)
