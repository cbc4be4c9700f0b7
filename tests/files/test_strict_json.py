"""JSON from strangers: what is refused, and that limits are looked at before anything is parsed."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.files import strict_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False,
                                                                        allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3, alphabet="ab\0é"), inner),
    max_leaves=20,
)  # fmt: skip


@given(VALUES)
@settings(max_examples=60, deadline=None)
def test_sound_values_come_back(value: Any) -> None:
    assert strict_json.loads(json.dumps(value)) == value
    assert strict_json.loads(json.dumps(value, ensure_ascii=False)) == value
    assert strict_json.loads_foreign(json.dumps(value), 10**6) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("NaN", "not a JSON number"),
        ("[-Infinity]", "not a JSON number"),
        ("1e999", "too large"),
        ("-1e999", "too large"),
        ("9" * 21, "64 bits"),
        ("9" * 5000, "64 bits"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "key 'a' occurs twice"),
        (r'"\ud800"', "half a character"),
        (r'{"\udc00": 1}', "half a character"),
        ("[" * 66 + "]" * 66, "too deeply"),
        ("[" * 900 + "]" * 900, "too deeply"),
        ("[" * 100_000, "too deeply"),
        ('{"a":' * 70 + "1" + "}" * 70, "too deeply"),
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("1 2", "Extra data"),
    ],
    ids=lambda text: text[:12],
)
def test_what_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        strict_json.loads(text)


def test_the_deepest_that_is_read() -> None:
    deep = "[" * strict_json.MAX_DEPTH + "]" * strict_json.MAX_DEPTH
    value = strict_json.loads(deep)
    for _ in range(strict_json.MAX_DEPTH - 1):
        (value,) = value
    assert value == []


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert strict_json.loads(r'"\ud83d\ude42"') == "\N{SLIGHTLY SMILING FACE}"


@pytest.mark.parametrize("mark", ["[],", "{},", '"",', "1,"])
def test_many_values_are_refused_unparsed(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    text = f"[{mark * strict_json.MAX_MARKS}0]"
    with pytest.raises(ValueError, match="commas and opening brackets"):
        strict_json.loads(text)


def test_foreign_files_may_hold_what_is_not_used() -> None:
    found = strict_json.loads_foreign('{"a": NaN, "b": 1, "b": 2}', 100)
    assert math.isnan(found["a"])
    assert found["b"] == 2
    with pytest.raises(ValueError, match="too deeply"):
        strict_json.loads_foreign("[" * 1000 + "]" * 1000, 10**6)
    with pytest.raises(ValueError, match="more than 3 commas"):
        strict_json.loads_foreign("[1,2,3,4]", 3)


def test_an_object_of_many_keys_is_no_long_work() -> None:
    """Comparing every key with every other would take hours."""
    keys = ",".join(f'"k{i}":0' for i in range(300_000))
    assert len(strict_json.loads(f"{{{keys}}}")) == 300_000
    with pytest.raises(ValueError, match="'k299999' occurs twice"):
        strict_json.loads(f'{{{keys},"k299999":1}}')
