"""A growing reply: its pieces are the decoded whole, cut where a stop text begins."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hkvprof.serve.text import GrowingText

TINYVL = "hkvprof/testbed/tinyvl"


def of_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def grown(ids: Sequence[int], decode: Any = of_bytes, stops: Sequence[str] = ()) -> list[str]:
    text = GrowingText(decode, stops)
    return [*(text.add(one) for one in ids), text.finish()]


@given(text=st.text(max_size=30))
def test_pieces_are_the_whole_and_never_half_a_character(text: str) -> None:
    pieces = grown(text.encode("utf-8", errors="ignore"))
    whole = text.encode("utf-8", errors="ignore").decode()
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.binary(max_size=40))
def test_bytes_that_are_no_text_come_out_all_the_same(data: bytes) -> None:
    text = "".join(grown(data))
    assert text.replace("\ufffd", "") == of_bytes(data).replace("\ufffd", "")


@given(
    text=st.text(alphabet="ab\n", max_size=40),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
)
def test_nothing_from_the_first_stop_on(text: str, stops: list[str]) -> None:
    pieces = grown(text.encode(), stops=stops)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    said = "".join(pieces)
    if places:
        seen = text[: min(text.find(stop) + len(stop) for stop in stops if stop in text)]
        assert said == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    else:
        assert said == text
    growing = GrowingText(of_bytes, stops)
    for one in text.encode():
        growing.add(one)
    assert growing.ended is bool(places)


def test_what_may_begin_a_stop_waits() -> None:
    assert grown(b"xenx", stops=["end"]) == ["x", "", "", "enx", ""]
    assert grown(b"xen", stops=["end"]) == ["x", "", "", "en"]
    assert grown(b"xend more", stops=["end"]) == ["x", *[""] * 9]


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINYVL)


@given(data=st.data())
def test_pieces_of_a_real_tokenizer(data: st.DataObject) -> None:
    size = len(tokenizer())
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=30))

    def decode(some: Sequence[int]) -> str:
        return str(tokenizer().decode(some, skip_special_tokens=True))

    assert "".join(grown(ids, decode)) == decode(ids)


@pytest.mark.parametrize("text", ["größer 漢字 🙂", "  two  spaces\n\n"])
def test_texts_of_many_bytes(text: str) -> None:
    assert "".join(grown(text.encode())) == text
