"""Mutations of JSON values, and of JSON text where a value cannot say it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any


class Raw(str):
    """Stands in a value for text that `json.dumps` would never write."""


RAW = [Raw(text) for text in ("1e999", "-1e999", "9" * 30, "9" * 5000, "NaN", "-Infinity",
                                      "01", "+1", "tru", "'x'", "0x10")]  # fmt: skip
STRINGS = [
    "", "x", "\0", "a\0b", "\x1b[2J\x07", "\ud800", "\udfff\ud800", "‮abc", "é", "🙂", "..", "../..",
    "/etc/hostname", "NaN", "1e9", "None", "static", "dynamic", "projected", "measured", "paper",
    "uniform", "\n", " ", "x" * 2000, "%s%n{0}", "[bold]markup[/bold]", "__class__",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 16, 32, 64, 65536, 65537, 4096, 2**31, 2**31 - 1, 2**32, 2**53,
    2**63 - 1, 2**63, -(2**63), 0.5, 1.5, -0.0, 1e-320, 1e308, -1e308, 0.1, 1.0, 1e30, 3.4e38, 1e39,
]  # fmt: skip
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"a": 1}, float("nan"), float("inf")]


def junk(random: Random) -> Any:
    """A value of any kind, most of them wrong."""
    kind = random.randrange(6)
    if kind == 0:
        return random.choice(STRINGS)
    if kind <= 2:
        return random.choice(NUMBERS)
    if kind == 3:
        return random.choice(RAW)
    if kind == 4:
        return copy.deepcopy(random.choice(OTHERS))
    return random.uniform(-2, 2)


def nested(random: Random) -> Any:
    """Lists or objects inside each other, up to thousands of them."""
    depth = random.choice([2, 30, 63, 65, 200, 900, 1100, 5000])
    opening, closing = random.choice([("[", "]"), ('{"a":', "}")])
    return Raw(opening * depth + "1" + closing * depth)


def many(random: Random) -> Any:
    """A long list or object."""
    count = random.choice([65, 300, 5000])
    return random.choice(
        [[0] * count, [[]] * count, [{}] * count, {str(i): i for i in range(count)}]
    )


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside `value`, except the outermost."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        outer = pending.pop()
        if isinstance(outer, dict | list):
            keys = list(outer) if isinstance(outer, dict) else list(range(len(outer)))
            found += [(outer, key) for key in keys]
            pending += [outer[key] for key in keys]
    return found


def _replace(random: Random, outer: Any, key: Any) -> None:
    outer[key] = junk(random)


def _nest(random: Random, outer: Any, key: Any) -> None:
    outer[key] = nested(random)


def _lengthen(random: Random, outer: Any, key: Any) -> None:
    outer[key] = many(random)


def _nudge(random: Random, outer: Any, key: Any) -> None:
    """A number near what is there, text of another case, a list in another order."""
    value = outer[key]
    if isinstance(value, bool) or value is None:
        outer[key] = not value
    elif isinstance(value, int | float):
        outer[key] = random.choice([value + 1, value - 1, -value, value * 2, value / 3, str(value)])
    elif isinstance(value, str):
        outer[key] = random.choice([value.upper(), value[:-1], value * 2, value + "\0", [value]])
    elif isinstance(value, list):
        outer[key] = random.choice(
            [value[:-1], value + value[-1:], value[::-1], dict.fromkeys("ab")]
        )
    else:
        outer[key] = list(value.values())


def _delete(random: Random, outer: Any, key: Any) -> None:
    del outer[key]


def _add(random: Random, outer: Any, key: Any) -> None:
    if isinstance(outer, dict):
        outer[random.choice([*STRINGS, str(key) + "2"])] = junk(random)
    else:
        outer.insert(key, junk(random))


def _exchange(random: Random, outer: Any, key: Any) -> None:
    other = random.choice(list(outer) if isinstance(outer, dict) else range(len(outer)))
    outer[key], outer[other] = outer[other], outer[key]


def _wrap(random: Random, outer: Any, key: Any) -> None:
    outer[key] = random.choice([[outer[key]], {"x": outer[key]}, [outer[key]] * 3])


_EDITS: list[Callable[[Random, Any, Any], None]] = [
    _replace, _replace, _replace, _nudge, _nudge, _delete, _add, _exchange, _wrap, _nest, _lengthen,
]  # fmt: skip


def mutated(random: Random, value: Any) -> Any:
    """A copy with one to three edits anywhere in it."""
    value = copy.deepcopy(value)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        found = places(value)
        if not found or random.random() < 0.01:
            return junk(random)
        outer, key = random.choice(found)
        random.choice(_EDITS)(random, outer, key)
    return value


def text_of(random: Random, value: Any) -> str:
    """The value as text; now and then with a key twice, cut off, or with a character changed."""
    text = _written(value)
    fate = random.random()
    if fate < 0.03:
        text = _doubled(random, text)
    elif fate < 0.05:
        text = text[: random.randrange(len(text) + 1)]
    elif fate < 0.08 and text:
        at = random.randrange(len(text))
        text = text[:at] + random.choice('{}[]",:0e-\\x\0') + text[at + 1 :]
    elif fate < 0.12:
        text = text.replace("\\u00e9", "\u00e9")
    return text


def _written(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        inner = (f"{json.dumps(key)}:{_written(entry)}" for key, entry in value.items())
        return f"{{{','.join(inner)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return json.dumps(value)


def _doubled(random: Random, text: str) -> str:
    """One key of the outermost object, or of an inner one, once more."""
    objects = [i for i, c in enumerate(text) if c == "{" and text[i + 1 : i + 2] == '"']
    if not objects:
        return text
    at = random.choice(objects) + 1
    return text[:at] + text[at : text.index('"', at + 1) + 1] + ":1," + text[at:]
