"""Sizes in bytes as people write them: `24GiB`, `1.5 MB`."""

from __future__ import annotations

import re

from hkvprof.errors import UsageError

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
"""Bytes by unit, lower case."""
_TEXT = re.compile(r"\s*(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})\s*([a-zA-Z%]*)\s*", re.ASCII)


def number_and_unit(text: str) -> tuple[str, str] | None:
    """`("1.5", "gib")` for `1.5 GiB`; None for anything but a plain number and letters or %."""
    match = _TEXT.fullmatch(text)
    return (match[1], match[2].lower()) if match else None


def parse_size(text: str, option: str) -> int:
    """Bytes; `option` is what the user called it. Zero needs no unit. Raises UsageError."""
    number, unit = number_and_unit(text) or ("", "")
    if number and not unit and float(number) == 0:
        return 0
    if unit not in UNITS:
        raise UsageError(
            f"{option} is a size in bytes, found {text!r}: give a number and a unit, such as "
            "24GiB, 800MiB or 80GB"
        )
    return int(float(number) * UNITS[unit])
