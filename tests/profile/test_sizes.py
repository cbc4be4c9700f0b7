"""Sizes of the model in a provenance, which anyone may have written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hkvprof.errors import ProfileError, UsageError
from hkvprof.profile.sizes import KEY, ModelSizes, context_for, sizes_told
from tests.profiles import make_profile

SIZES = ModelSizes(1000, 1900, 4096)


def test_they_come_back() -> None:
    profile = replace(make_profile(), provenance={KEY: SIZES.to_json()})
    assert profile.sizes == SIZES
    assert (SIZES.weights(2), SIZES.weights(4)) == (1000, 1900)
    assert make_profile().sizes is None
    assert profile.content_digest == make_profile().content_digest


@pytest.mark.parametrize(
    "change",
    [{"weight_bytes": 0}, {"weight_bytes": True}, {"weight_bytes": 2**61}, {"weight_bytes": None},
     {"longest_context": -1}, {"longest_context": "8"}, {"longest_context": 2**41}, {"more": 1}],
)  # fmt: skip
def test_damaged_ones_are_refused(change: dict[str, Any]) -> None:
    told = {KEY: {**SIZES.to_json(), **change}}
    with pytest.raises(ProfileError, match=r"provenance\.model: expected"):
        replace(make_profile(), provenance=told)
    with pytest.raises(ProfileError, match="expected an object as the record"):
        sizes_told({KEY: [1]})


def test_contexts() -> None:
    told = {KEY: SIZES.to_json()}
    assert [context_for(told, n) for n in (None, 1, 4096)] == [4096, 1, 4096]
    with pytest.raises(UsageError, match="longest context has 4,096 tokens"):
        context_for(told, 4097)
    assert [context_for({}, n) for n in (None, 2**20)] == [32768, 2**20]
    long = {KEY: {**SIZES.to_json(), "longest_context": 2**17}}
    assert context_for(long, None) == 32768
