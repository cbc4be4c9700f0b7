"""Model arguments are sorted, completed, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from hkvprof.errors import UsageError
from hkvprof.plugins.session import MIN_TOKENS, Arguments, refuse_processes

GIVEN: dict[str, Any] = {"pretrained": "tinyvl", "profile": "p.safetensors"}


def test_arguments_go_to_those_who_take_them() -> None:
    given = {**GIVEN, "budget": 0.1, "dtype": "float32", "max_length": 99, "batch_size": "4"}
    read = Arguments.read(given, ("max_length", "truncation"))
    assert read.runtime == {"budget": 0.1, "min_tokens": MIN_TOKENS}
    assert read.loading == {"dtype": "float32"}
    assert read.harness == {"max_length": 99}
    assert read.batch_size == 4


def test_none_is_not_given() -> None:
    read = Arguments.read({**GIVEN, "device": None, "max_batch_size": None})
    assert read.loading == {}
    assert read.batch_size == 1


def test_given_min_tokens_win() -> None:
    assert Arguments.read({**GIVEN, "min_tokens": 8}).runtime == {"min_tokens": 8}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"buget": 0.1}, "no argument 'buget'.*Did you mean budget"),
        ({"trust_remote_code": True}, "no argument 'trust_remote_code'"),
        ({"max_length": 8}, "no argument 'max_length'"),
        ({"decode_compression": False}, "'decode_compression'.*compress_every=0"),
        ({"batch_size": "auto"}, "batch_size must be a number.*'auto'"),
        ({"batch_size": 0}, "batch_size must be a number"),
        ({"min_tokens": "many"}, "min_tokens must be a whole number, found 'many'"),
        ({"compress_every": True}, "compress_every must be a whole number, found True"),
    ],
)
def test_what_is_wrong_is_named(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Arguments.read({**GIVEN, **more})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="needs pretrained and profile"):
        Arguments.read({"budget": 0.1})


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE=2"):
        refuse_processes()
