"""Differences between profiles: worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hkvprof.errors import ProfileError
from hkvprof.heads import KeepRule
from hkvprof.report.difference import difference, lines
from tests.profiles import make_profile


def test_a_profile_is_the_same_as_itself_whatever_its_provenance() -> None:
    first = make_profile()
    found = difference(first, replace(first, provenance={"samples": 3}))
    assert found.is_same
    assert (found.settings, found.arrays, found.flips) == ((), (), ())
    assert (found.agreement, found.share_change, found.largest_change) == (1, 0, 0)
    assert lines(found) == ["The profiles are the same (apart from their provenance)."]
    assert found.to_json()["same"] is True


def test_every_change_is_told() -> None:
    first = make_profile()
    types = [strategy.head_type for strategy in first.strategies]
    static, dynamic = types.index(0), types.index(1)
    choice, budget = first.strategy.copy(), first.budget.copy()
    layer, head = 0, 1
    was = int(first.head_types[layer, head])
    choice[layer, head] = static if was else dynamic
    budget[layer, head] = np.float32(float(budget[layer, head]) / 2)
    second = replace(first, strategy=choice, budget=budget, default_budget=0.05,
                     keep=KeepRule(1, 2, 3))  # fmt: skip
    found = difference(first, second)
    assert not found.is_same
    assert found.settings == ("default_budget", "keep")
    assert found.arrays == ("budget", "strategy")
    heads = first.strategy.size
    assert found.agreement == pytest.approx((heads - 1) / heads)
    names = ("dynamic", "static") if was else ("static", "dynamic")
    (flip,) = found.flips
    assert (flip.layer, flip.head, flip.first, flip.second) == (layer, head, *names)
    half = float(first.budget[layer, head]) / 2
    assert found.largest_change == pytest.approx(half)
    assert found.share_change == pytest.approx(half / heads)
    told = "\n".join(lines(found))
    assert "settings that differ: default_budget, keep" in told
    assert "1 flipped" in told
    assert f"layer   0 head  1  {names[0]} -> {names[1]}" in told
    back = difference(second, first)
    assert (back.flips[0].first, back.flips[0].second) == names[::-1]


def test_profiles_of_different_models_are_not_compared() -> None:
    first = make_profile()
    other = replace(first, fingerprint=replace(first.fingerprint, architecture="Other"))
    with pytest.raises(ProfileError, match=r"different models .architecture"):
        difference(first, other)


def test_curves_alone_make_a_difference() -> None:
    first = make_profile()
    found = difference(first, replace(first, loss=first.loss * 2))
    assert not found.is_same
    assert found.arrays == ("loss",)
    assert found.flips == ()
