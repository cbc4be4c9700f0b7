"""Budgets: how users write them, and how one is dealt out over KV heads by their loss curves.

Numpy only.

The problem: choose a strategy s and a kept share r for every head so that the summed loss is
least while the mean share, all bytes included, stays within the budget. Ratios in the curves are
all-in (a dynamic head's index is inside its ratio), and all heads have equal dense bytes, so bytes
are simply the mean of the ratios. Every head's best curve over the menu is made monotone and
convex (lower hull); then the steepest segments of all heads together are bought first, which is
the Lagrangian optimum of the convexified problem.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

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


INFEASIBLE = np.float32(1e30)
"""Loss of a strategy whose fixed bytes alone exceed the ratio."""

NEAR = 1e-4
"""A ratio this little below a measured one, relatively, is taken for it.

Measured ratios are float32: 0.2 among them is 0.2 + 3e-9, so that a budget of 0.2 buys it for all
heads but the last, whose ratio is short by what the others are over. What fits at a measured ratio
must therefore fit at this little less (planning.plan_anew).
"""


@dataclass(frozen=True)
class Budget:
    """What a request may keep: exactly one of a share of dense bytes, tokens per head, or bytes."""

    share: float | None = None
    tokens: int | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, value: float | int | str | Budget) -> Budget:
        """Read `0.10` (share), `4096` (tokens, an int above 1), `"2GiB"`, `"10%"` or `"0.1"`.

        Raises BudgetError on anything else.
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
    return (
        f"budget {value!r} is not understood: expected a share in (0, 1] such as 0.10 or '10%', "
        "a number of tokens such as 4096, or bytes such as '2GiB'"
    )


Extra = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From the ratios of all heads, layer by layer, to costs [heads, strategies] beside the loss."""


@dataclass(frozen=True)
class Allocation:
    """Decisions for every head; arrays are [layers, kv_heads].

    `head_loss` is each head's share of `expected_loss`; both are NaN where nothing was measured.
    """

    strategy: NDArray[np.uint8]
    ratio: NDArray[np.float32]
    expected_loss: float
    head_loss: NDArray[np.float64] | None = None


def allocate(
    loss: NDArray[np.float32],
    ratios: NDArray[np.float32],
    share: float,
    floor: float,
    even: float = 0.0,
    extra: Extra | None = None,
) -> Allocation:
    """Choose strategy and ratio per head within a mean ratio of `share`.

    `loss` is [strategies, layers, kv_heads, ratios] (INFEASIBLE where a strategy does not fit),
    `ratios` ascending and ending at 1, `floor` the least ratio any head may get; the part `even` of
    the budget, in [0, 1], is dealt evenly, and only the rest by loss. What `extra` says of a ratio
    is added where a head chooses its strategy, not to the losses. Heads are judged at the very
    ratios that they get. Raises BudgetError when `share` is below `floor`. Never exceeds `share`;
    ratios are monotone in it.
    """
    strategies, layers, kv_heads, _ = loss.shape
    _check_share(share, floor)
    heads = layers * kv_heads
    flat = loss.transpose(1, 2, 0, 3).reshape(heads, strategies, -1).astype(np.float64)
    grid = np.concatenate([[floor], ratios[ratios > floor]]).astype(np.float64)
    curves = _interpolate(np.log(ratios.astype(np.float64)), flat, np.log(grid))
    ratio = _round_down(_spend(curves.min(axis=1), grid, share, max(floor, even * share)))
    at_ratio = _losses_at(flat, ratios, ratio.astype(np.float64))
    judged = at_ratio if extra is None else at_ratio + extra(ratio.astype(np.float64))
    choice = np.where(at_ratio < INFEASIBLE, judged, np.inf).argmin(axis=1)
    least = np.take_along_axis(at_ratio, choice[:, None], axis=1)[:, 0]
    if float(least.max()) >= INFEASIBLE:
        raise BudgetError(
            f"budget {share:.4g} is too small: no strategy of some heads fits their share; raise "
            "the budget or use longer prompts"
        )
    return Allocation(
        strategy=choice.astype(np.uint8).reshape(layers, kv_heads),
        ratio=ratio.reshape(layers, kv_heads),
        expected_loss=float(least.sum()),
        head_loss=least.reshape(layers, kv_heads),
    )


def losses_of(
    loss: NDArray[np.float32],
    ratios: NDArray[np.float32],
    strategy: NDArray[np.uint8],
    ratio: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Loss of every head under its `strategy` at its `ratio`, all [layers, kv_heads].

    NaN where the strategy was not measured at that ratio, because it did not fit.
    """
    flat = loss.transpose(1, 2, 0, 3).reshape(ratio.size, len(loss), -1).astype(np.float64)
    at_ratio = _losses_at(flat, ratios, ratio.reshape(-1).astype(np.float64))
    own = np.take_along_axis(at_ratio, strategy.reshape(-1, 1).astype(np.intp), axis=1)
    return np.where(own < INFEASIBLE, own, np.nan).reshape(ratio.shape)


def _losses_at(
    flat: NDArray[np.float64], ratios: NDArray[np.float32], ratio: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[heads, strategies] losses; `flat` [heads, strategies, ratios], `ratio` [heads]."""
    known = np.log(ratios.astype(np.float64))
    return np.stack(
        [
            _interpolate(known, flat[h : h + 1], np.log(ratio[h : h + 1]))[0, :, 0]
            for h in range(len(flat))
        ]
    )


def scale_ratios(base: NDArray[np.float32], share: float, floor: float) -> NDArray[np.float32]:
    """Ratios in proportion to `base`, clipped to [floor, 1], with a mean of at most `share`.

    Raises BudgetError when `share` is below `floor`.
    """
    _check_share(share, floor)
    low, high = 0.0, 1.0 / float(base.min())
    for _ in range(60):
        middle = (low + high) / 2
        if float(np.clip(base.astype(np.float64) * middle, floor, 1).mean()) <= share:
            low = middle
        else:
            high = middle
    return _round_down(np.clip(base.astype(np.float64) * (high if share >= 1 else low), floor, 1))


def _check_share(share: float, floor: float) -> None:
    if share < floor:
        raise BudgetError(
            f"budget {share:.4g} is too small: sinks, recent tokens and the floor alone need "
            f"{floor:.4g} of this prompt; raise the budget or use longer prompts"
        )


def _interpolate(
    known: NDArray[np.float64], values: NDArray[np.float64], wanted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Monotone curves at `wanted` abscissae; values [heads, strategies, known].

    A point whose left neighbour is infeasible is infeasible too (never promise what may not fit),
    unless the right one is NEAR.
    """
    values = np.minimum.accumulate(values, axis=-1)
    right = np.clip(np.searchsorted(known, wanted, side="left"), 0, len(known) - 1)
    left = np.maximum(right - 1, 0)
    exact = (known[right] <= wanted) | (right == 0)
    span = np.where(exact, 1.0, known[right] - known[left])
    part = np.where(exact, 1.0, np.clip((wanted - known[left]) / span, 0, 1))
    low, high = values[..., left], values[..., right]
    # Where part is 1 the left value must not enter at all: 1e30 + (x - 1e30) is 0, not x.
    blend = np.where(part >= 1, high, low + part * (high - low))
    near = exact | (known[right] - wanted <= NEAR)
    return np.where(low >= INFEASIBLE, np.where(near, high, float(INFEASIBLE)), blend)


def _spend(
    best: NDArray[np.float64], grid: NDArray[np.float64], share: float, floor: float
) -> NDArray[np.float64]:
    """Kept ratio per head: buy the steepest hull segments first. best is [heads, grid].

    Hulls begin at the first point of the grid, whatever the `floor`, so that a larger floor never
    changes the order in which segments are bought.
    """
    heads = len(best)
    segments = [
        (-(curve[j] - curve[i]) / (grid[j] - grid[i]), head, grid[j] - max(grid[i], floor), grid[j])
        for head, curve in enumerate(best)
        for i, j in _hull(grid, curve)
        if grid[j] > floor
    ]
    segments.sort(key=lambda item: (-item[0], item[1]))
    if share >= 1:
        return np.ones(heads)
    ratio = np.full(heads, floor, dtype=np.float64)
    left = max(0.0, (share - floor) * heads)
    for _, head, width, end in segments:
        step = min(width, left)
        whole = step == width
        ratio[head] = end if whole else ratio[head] + step
        left -= step
        if left <= 0:
            break
    return ratio


def _hull(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Index pairs of the lower convex hull's segments, left to right."""
    vertices: list[int] = []
    for i in range(len(x)):
        while len(vertices) > 1:
            a, b = vertices[-2], vertices[-1]
            if (y[b] - y[a]) * (x[i] - x[b]) >= (y[i] - y[b]) * (x[b] - x[a]):
                vertices.pop()
            else:
                break
        vertices.append(i)
    return list(pairwise(vertices))


def _round_down(ratio: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32 that never exceeds the float64 it came from."""
    single = ratio.astype(np.float32)
    above = single.astype(np.float64) > ratio
    single[above] = np.nextafter(single[above], np.float32(0))
    return single
