"""Generation settings of tasks: kept, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from hkvprof.errors import UsageError
from hkvprof.plugins.requests import MAX_NEW_TOKENS, Generation

GREEDY = {"do_sample": False}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"max_new_tokens": MAX_NEW_TOKENS, **GREEDY}),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1},
            {"max_new_tokens": 16, **GREEDY},
        ),
        (
            {"max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9},
            {"max_new_tokens": 16, "do_sample": True, "temperature": 0.7, "top_p": 0.9},
        ),
        (
            {"max_new_tokens": 16, "do_sample": True, "temperature": 0},
            {"max_new_tokens": 16, **GREEDY},
        ),
        (
            {"max_new_tokens": 16, "do_sample": False, "temperature": 0.7},
            {"max_new_tokens": 16, **GREEDY},
        ),
        ({"max_new_tokens": 16, "do_sample": True}, {"max_new_tokens": 16, "do_sample": True}),
        (
            {"max_new_tokens": 16, "num_beams": 4, "repetition_penalty": 1.1, "top_p": None},
            {"max_new_tokens": 16, **GREEDY, "num_beams": 4, "repetition_penalty": 1.1},
        ),
    ],
)
def test_settings_become_arguments(given: dict[str, Any], options: dict[str, Any]) -> None:
    assert Generation.read(given).options == options


def test_replies_end_at_the_first_stop() -> None:
    assert Generation.read({"until": ["\n\n", "Q:"]}).cut("two Q: three\n\nfour") == "two "
    assert Generation.read({"until": "\n"}).cut("one line") == "one line"
    assert Generation.read({"until": ""}).cut("as it is") == "as it is"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 1, "stop_sequences": ["a"]}, "sets seed, stop_sequences"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio='pad'"),
    ],
)
def test_what_cannot_be_kept_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Generation.read(given)
    assert Generation.read({"image_aspect_ratio": "original"}).options
