"""Statistics in profile files: what cannot be is refused, whoever wrote it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hkvprof.errors import ProfileError
from hkvprof.profile.record import load_profile
from tests.profile.test_record import parts, refused, write
from tests.profiles import GRID, head_statistics, make_profile

NAMES = [name.removeprefix("statistics.") for name in head_statistics(GRID).tensors()]


def test_they_survive_the_disk_and_are_read_only(tmp_path: Path) -> None:
    made = make_profile()
    read = load_profile(made.save(tmp_path / "p.safetensors"))
    assert read.statistics is not None
    assert made.statistics is not None
    for name in NAMES:
        array = getattr(read.statistics, name)
        np.testing.assert_array_equal(array, getattr(made.statistics, name))
        assert not array.flags.writeable


def test_a_profile_may_have_none(tmp_path: Path) -> None:
    made = replace(make_profile(), statistics=None)
    assert load_profile(made.save(tmp_path / "p.safetensors")).statistics is None


@pytest.mark.parametrize("name", NAMES)
def test_all_or_none(name: str, tmp_path: Path) -> None:
    metadata, tensors = parts()
    del tensors[f"statistics.{name}"]
    assert name in refused(write(tmp_path / "p.safetensors", metadata, tensors))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_kinds_and_numbers_are_checked(name: str, tmp_path: Path) -> None:
    metadata, tensors = parts()
    key = f"statistics.{name}"
    sound = tensors[key]
    wrong = [sound[:1], sound.astype(np.float64), np.stack([sound, sound])]
    if sound.dtype.kind == "f":
        for value in (np.nan, np.inf, -0.25, 1.25):
            wrong.append(sound.copy())
            wrong[-1].flat[1] = value
    else:
        wrong.append(sound - 100)
    for number, array in enumerate(wrong):
        path = write(tmp_path / f"{number}.safetensors", metadata, {**tensors, key: array})
        assert key in refused(path)


@pytest.mark.parametrize(
    ("name", "place", "value", "reason"),
    [
        ("modality_mass_mean", (1, 0, 0), 0.9, "does not sum to 1"),
        ("drift_samples", (1,), 0, "not 0 for a pair that no sample has"),
    ],
)
def test_figures_that_contradict_each_other(
    name: str, place: tuple[int, ...], value: float, reason: str
) -> None:
    statistics = head_statistics(GRID)
    wrong = getattr(statistics, name).copy()
    wrong[place] = value
    with pytest.raises(ProfileError, match=reason):
        replace(make_profile(), statistics=replace(statistics, **{name: wrong}))


def test_an_older_file_has_no_statistics(tmp_path: Path) -> None:
    metadata, tensors = parts()
    message = refused(write(tmp_path / "p.safetensors", {**metadata, "schema": 2}, tensors))
    assert "in a file of schema version 2" in message
