"""JSON from strangers: parsed within limits of size and depth."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

MAX_DEPTH = 64
"""Most objects and lists around a value."""
MAX_MARKS = 2_000_000
"""Most commas and opening brackets: each may cost a hundred bytes once it is parsed."""
_INTEGER_DIGITS = 19


def loads(text: str, most: int = MAX_MARKS) -> Any:
    """The value of `text`. Raises ValueError, saying what is wrong.

    Refused besides what is no JSON: NaN, infinity and numbers that overflow to it, integers of more
    than 64 bits, a key twice in an object, half a surrogate pair, more than MAX_DEPTH levels, and
    more than `most` commas and opening brackets, counted before anything is parsed.
    """
    return _parse(
        text,
        most,
        parse_constant=_no_constant,
        parse_float=_finite,
        parse_int=_integer,
        object_pairs_hook=_unique_keys,
    )


def loads_foreign(text: str, most: int) -> Any:
    """The value of a file that others published, within the same limits of size and depth.

    What a reader does not use may be NaN or stand there twice. Raises ValueError.
    """
    return _parse(text, most)


def _parse(text: str, most: int, **hooks: Any) -> Any:
    if sum(text.count(mark) for mark in "{[,") > most:
        raise ValueError(f"more than {most:,} commas and opening brackets")
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    _check_depth(value)
    if hooks and "\\u" in text:
        _check_unicode(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"nested too deeply: more than {MAX_DEPTH} levels"


def _check_unicode(value: Any) -> None:
    """Half a surrogate pair can be written as an escape, but nowhere be printed."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text holds half a character (a lone surrogate)") from None


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > _INTEGER_DIGITS + 1:
        raise ValueError(f"the integer {text[:20]}... has more than 64 bits")
    return int(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"key {twice[:60]!r} occurs twice")
    return record
