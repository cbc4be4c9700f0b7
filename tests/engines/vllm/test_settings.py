"""What users write into additional_config is read strictly."""

from __future__ import annotations

import pytest

from hkvprof.engines.vllm.settings import EngineSettings, settings_of
from hkvprof.errors import HkvError


def test_settings_are_read_or_absent() -> None:
    given = {"hkvprof": {"profile": "p.safetensors", "budget": "20%"}}
    assert settings_of(given) == EngineSettings("p.safetensors", "20%")
    for other in ({}, {"else": 1}, None, object()):
        assert settings_of(other) is None


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "must be an object"),
        ([], "must be an object"),
        ({"profile": "p"}, r"missing \['budget'\]"),
        ({"profile": "p", "budget": 0.2, "budgets": 1}, r"unknown \['budgets'\]"),
        ({"profile": "", "budget": 0.2}, "must be a path"),
        ({"profile": 3, "budget": 0.2}, "must be a path"),
        ({"profile": "p", "budget": 0}, "is not understood"),
        ({"profile": "p", "budget": True}, "is not understood"),
        ({"profile": "p", "budget": 4096}, "share of dense bytes"),
        ({"profile": "p", "budget": "2GiB"}, "share of dense bytes"),
        ({"profile": "p", "budget": 0.2, "untested": "yes"}, "true or false"),
    ],
)
def test_what_is_wrong_is_named(value: object, told: str) -> None:
    with pytest.raises(HkvError, match=told):
        settings_of({"hkvprof": value})
