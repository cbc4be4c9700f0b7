"""Budgets as users write them: what may be kept on the device, and what a step may read.

How they are dealt out over heads is in `dealing`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import BudgetError, UsageError

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


LEAST_TOKENS = 100
"""Below it a number as text is no number of tokens per head: a percentage was meant."""
_KINDS = (
    "expected a share in (0, 1] such as 0.10 or '10%', a number of tokens (100 or more as text) "
    "such as 4096, or bytes such as '2GiB'"
)


INFEASIBLE = np.float32(1e30)
"""Loss of a strategy whose fixed bytes alone exceed the ratio."""

NEAR = 1e-4
"""A ratio this little below a measured one, relatively, is taken for it.

Measured ratios are float32: 0.2 among them is 0.2 + 3e-9, so that a budget of 0.2 buys it for all
heads but the last, whose ratio is short by what the others are over. What fits at a measured ratio
must therefore fit at this little less (planning.plan_anew).
"""


ANY = 2**31 - 1
"""Items that may become hot in a step, where as many may as a head holds."""


@dataclass(frozen=True)
class Allocation:
    """Decisions for every head; arrays are [layers, kv_heads].

    `head_loss` is each head's share of `expected_loss`; both are NaN where nothing was measured.
    In one decoding step at most `fresh` items of a dynamic head become hot (None: ANY).
    """

    strategy: NDArray[np.uint8]
    ratio: NDArray[np.float32]
    expected_loss: float
    head_loss: NDArray[np.float64] | None = None
    fresh: NDArray[np.int64] | None = None

    @property
    def limits(self) -> NDArray[np.int64]:
        """`fresh`, or ANY for all heads."""
        return np.full(self.ratio.shape, ANY) if self.fresh is None else self.fresh


@dataclass(frozen=True)
class Budget:
    """What a request may keep: exactly one of a share of dense bytes, tokens per head, or bytes."""

    share: float | None = None
    tokens: int | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, value: float | int | str | Budget) -> Budget:
        """Read `0.10` (share), `4096` (tokens, an int above 1), `"2GiB"`, `"10%"` or `"0.1"`.

        Raises BudgetError on anything else, and on a text such as `"5"`, which is rather 5%.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool):
            raise BudgetError(_expected(value))
        if isinstance(value, (int, np.integer)) and value > 1:
            return cls(tokens=int(value))
        if isinstance(value, (int, float, np.floating)):
            if not 0 < float(value) <= 1:
                raise BudgetError(_expected(value))
            return cls(share=float(value))
        return cls._parse_text(str(value))

    @classmethod
    def _parse_text(cls, text: str) -> Budget:
        parts = number_and_unit(text)
        if not parts:
            raise BudgetError(_expected(text))
        number, unit = parts
        if unit == "%":
            return cls.parse(float(number) / 100)
        if unit in UNITS:
            size = int(float(number) * UNITS[unit])
            if size < 1:
                raise BudgetError(_expected(text))
            return cls(bytes=size)
        if unit:
            raise BudgetError(_expected(text))
        if 1 < float(number) < LEAST_TOKENS:
            raise BudgetError(
                f"budget {text!r} is not understood: did you mean {text.strip()}%? {_KINDS}"
            )
        return cls.parse(int(number) if number.isdigit() else float(number))

    def resolve(self, tokens: int, dense_bytes: int) -> float:
        """The share in (0, 1] for a prompt of `tokens` tokens and `dense_bytes` of dense K/V."""
        if self.share is not None:
            return self.share
        if self.tokens is not None:
            return min(1.0, self.tokens / max(tokens, 1))
        assert self.bytes is not None
        return min(1.0, self.bytes / max(dense_bytes, 1))

    def __str__(self) -> str:
        if self.share is not None:
            return f"{self.share:.4g} of dense bytes"
        return (
            f"{self.tokens} tokens per head" if self.tokens is not None else f"{self.bytes} bytes"
        )


def _expected(value: object) -> str:
    return f"budget {value!r} is not understood: {_KINDS}"


@dataclass(frozen=True)
class Fetch:
    """What a decoding step may read from host memory, per row: a share of the row's dense K/V
    bytes, or bytes; neither: the knee (profile.dealing), which is the default."""

    share: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, value: float | int | str | Fetch | None) -> Fetch:
        """Read `0.01` (share), `"1%"`, `"2MiB"`, `0` (no host memory at all), `"unlimited"` or
        infinity, and None (the knee).

        Raises BudgetError on anything else.
        """
        if isinstance(value, Fetch):
            return value
        if value is None:
            return cls()
        if isinstance(value, bool):
            raise BudgetError(_expected_fetch(value))
        if isinstance(value, (int, float, np.integer, np.floating)):
            return cls._share(float(value), value)
        return cls._parse_text(str(value))

    @classmethod
    def _share(cls, share: float, found: object) -> Fetch:
        if not (0 <= share <= 1 or share == math.inf):
            raise BudgetError(_expected_fetch(found))
        return cls(share=share)

    @classmethod
    def _parse_text(cls, text: str) -> Fetch:
        if text.strip().lower() in ("unlimited", "inf"):
            return cls(share=math.inf)
        number, unit = number_and_unit(text) or ("", "?")
        if unit in UNITS:
            return cls(bytes=int(float(number) * UNITS[unit]))
        if unit not in ("", "%"):
            raise BudgetError(_expected_fetch(text))
        return cls._share(float(number) / (100 if unit else 1), text)

    def resolve(self, dense_bytes: int) -> float | None:
        """The share of a row's `dense_bytes`, infinite where nothing is limited; None: the knee."""
        if self.bytes is not None:
            return self.bytes / max(dense_bytes, 1)
        return self.share

    def __str__(self) -> str:
        if self.bytes is not None:
            return f"{self.bytes} bytes a step"
        if self.share is None:
            return "the knee"
        return "unlimited" if self.share == math.inf else f"{self.share:.4g} of dense bytes a step"


FetchLike = float | int | str | Fetch | None
"""What Fetch.parse reads."""


def _expected_fetch(value: object) -> str:
    return (
        f"fetch {value!r} is not understood: expected what a decoding step may read from host "
        "memory, as a share of dense bytes such as 0.01 or '1%', bytes such as '2MiB', 0 for no "
        "host memory at all, or 'unlimited'"
    )
