"""The record of a certificate: what is sound, and of which profile it speaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof import load_profile
from hkvprof.errors import ProfileError
from hkvprof.profile.certificate import (
    KEY,
    Certificate,
    Level,
    fixed_sequence,
    recorded,
)
from hkvprof.profile.record import Profile
from tests.profiles import make_certificate, make_profile, with_certificate


def levels_of(passes: list[bool], samples: list[int]) -> list[Level]:
    return [
        Level(1 / (2 + i), count, 0, 0.01 if good else 0.5)
        for i, (good, count) in enumerate(zip(passes, samples, strict=True))
    ]


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([50, 100])), min_size=1, max_size=8))
def test_the_sequence_stops_at_the_first_that_fails(drawn: list[tuple[bool, int]]) -> None:
    passes, samples = [p for p, _ in drawn], [s for _, s in drawn]
    levels = levels_of(passes, samples)
    good = [p and s == 100 for p, s in drawn]
    run = good.index(False) if False in good else len(good)
    wanted = levels[run - 1].budget if run else None
    assert fixed_sequence(levels, 100, 0.05) == wanted


def test_round_trip(tmp_path: Path) -> None:
    profile = with_certificate(make_profile())
    found = load_profile(profile.save(tmp_path / "p"))
    assert found.certificate == make_certificate(profile)
    assert recorded(make_profile().provenance) is None
    assert make_profile().certificate is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", 0.9), ("alpha", True), ("alpha", "0.02"), ("delta", 0.5), ("delta", float("nan")),
        ("loss", "vibes"), ("samples", 0), ("samples", 149.0), ("samples", 10**3), ("levels", []),
        ("levels", [{"budget": 0.5}]), ("levels", "all"), ("certified", 0.1), ("certified", None),
        ("certified", True), ("reason", "because"), ("regimes", "inside"), ("full_score", 2),
        ("content", 7), ("data", "x" * 2000), ("options", {"min_tokens": -1}), ("versions", [1]),
    ],
)  # fmt: skip
def test_records_that_are_not_sound_are_refused_on_loading(name: str, value: object) -> None:
    plain = make_certificate(make_profile()).to_json()
    assert Certificate.from_json(plain).to_json() == plain
    with pytest.raises(ProfileError, match=r"provenance\.certificate: expected .* found"):
        Certificate.from_json({**plain, name: value})
    with pytest.raises(ProfileError, match="certificate"):
        replace(make_profile(), provenance={KEY: {**plain, name: value}})


@pytest.mark.parametrize(
    "change",
    [
        {"budget": 0.5}, {"samples": 151}, {"degraded": 151}, {"degraded": -1}, {"p_value": 1.5},
        {"p_value": 0.2}, {"samples": 100}, {"more": 1},
    ],
)  # fmt: skip
def test_levels_that_contradict_the_verdict_are_refused(change: dict[str, Any]) -> None:
    """The second level is the certified one."""
    plain = make_certificate(make_profile()).to_json()
    plain["levels"] = [dict(level) for level in plain["levels"]]
    plain["levels"][1] |= change
    with pytest.raises(ProfileError, match="certificate"):
        Certificate.from_json(plain)


def test_missing_and_unknown_fields_are_refused() -> None:
    plain = make_certificate(make_profile()).to_json()
    assert Certificate.from_json({k: v for k, v in plain.items() if k != "fetch"}).fetch == (
        "unlimited"
    )  # older ones
    for name in plain.keys() - {"fetch"}:
        with pytest.raises(ProfileError):
            Certificate.from_json({k: v for k, v in plain.items() if k != name})
    with pytest.raises(ProfileError, match="more"):
        Certificate.from_json({**plain, "more": 1})


def changed(profile: Profile, name: str) -> Profile:
    array = getattr(profile, name).copy()
    array.flat[0] = 1 if array.dtype == np.uint8 else array.flat[0] / 2
    return replace(profile, **{name: array})


@pytest.mark.parametrize("name", ["loss", "strategy", "budget", "ratios"])
def test_a_certificate_does_not_survive_a_change_of_what_was_tested(name: str) -> None:
    profile = with_certificate(make_profile())
    other = changed(profile, name)
    assert recorded(other.provenance) is not None
    assert other.certificate is None
    assert replace(profile, keep=replace(profile.keep, sinks=3)).certificate is None


def test_a_certificate_survives_a_change_of_anything_else() -> None:
    profile = with_certificate(make_profile())
    other = replace(profile, provenance={**profile.provenance, "data": "elsewhere"})
    assert other.certificate == profile.certificate
    assert other.content_digest == make_profile().content_digest
