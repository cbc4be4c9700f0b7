"""Bounds of what a profile holds, as checks of plain values: a profile is data from strangers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import ProfileError
from hkvprof.heads import (
    EXACT_BITS,
    MOST_ADAPTERS,
    SCORES,
    WINDOW,
    HeadGrid,
    HeadType,
    KeepRule,
    ModelFingerprint,
    Strategy,
)

MAX_RATIOS = 1024
_LIMITS = HeadGrid(layers=1024, query_heads=1024, kv_heads=1024, head_dim=1024)
MOST_LENGTHS, MOST_TOKENS = 16, 2**40
LONGEST_TEXT = 1024
"""Characters of a text in a fingerprint or a record of the provenance."""
_FINGERPRINT_TEXTS = (
    "architecture", "config_hash", "weights_digest", "hub_id", "commit", "quantisation",
)  # fmt: skip
_RECIPES = ("paper", "measured", "uniform")
_INDEXES = ("mean", "minmax", "projected")


def require(condition: bool, message: str) -> None:
    """Raise ProfileError with `message` unless `condition` holds."""
    if not condition:
        raise ProfileError(message)


def expect(name: str, array: Any, shape: tuple[int, ...], dtype: type) -> None:
    """Raise ProfileError unless `array` has that shape and dtype and finite values."""
    found = (getattr(array, "shape", None), getattr(array, "dtype", None))
    wanted = np.dtype(dtype)
    require(
        found == (shape, wanted),
        f"tensor {name} should be {wanted.name} of shape {shape}, found {found[1]} {found[0]}",
    )
    if array.dtype.kind == "f":
        require(bool(np.isfinite(array).all()), f"tensor {name} holds NaN or infinite values")


def expect_shares(name: str, array: NDArray[np.float32]) -> None:
    """Raise ProfileError unless all values lie in [0, 1], with room for rounding of sums."""
    sound = bool((array >= 0).all()) and bool((array <= 1 + 1e-3).all())
    require(sound, f"tensor {name} holds values outside [0, 1]")


def check_setting(
    fingerprint: ModelFingerprint,
    recipe: str,
    keep: KeepRule,
    strategies: tuple[Strategy, ...],
    kappas: tuple[float, ...],
) -> None:
    """Raise ProfileError unless what is measured, and of which model, is of its kind and in bounds.

    The arguments are fields of a profile (profile.record.Profile) and of a folder of rows.
    """
    _check_grid(fingerprint.grid)
    _check_fingerprint(fingerprint)
    _check_rules(recipe, keep)
    _check_menu(strategies, kappas)


def check_budget(budget: object) -> None:
    """Raise ProfileError unless a default budget is a share in (0, 1]."""
    require(
        _is_number(budget) and 0 < budget <= 1,
        f"default_budget must lie in (0, 1], found {budget!r}",
    )


def _check_grid(grid: HeadGrid) -> None:
    """Raise ProfileError unless the geometry is possible and of sane size."""
    for name in ("layers", "query_heads", "kv_heads", "head_dim"):
        value, limit = getattr(grid, name), getattr(_LIMITS, name)
        message = f"{name} must be an integer from 1 to {limit}, found {value!r}"
        require(_is_int(value, 1, limit), message)
    require(
        grid.query_heads % grid.kv_heads == 0,
        f"{grid.query_heads} query heads cannot share {grid.kv_heads} KV heads evenly",
    )


def _check_fingerprint(fingerprint: ModelFingerprint) -> None:
    """Raise ProfileError unless every field has its kind."""
    for name in _FINGERPRINT_TEXTS:
        message = f"fingerprint.{name} must be a string of at most 1024 printable characters"
        require(_is_text(getattr(fingerprint, name)), message)
    require(
        len(fingerprint.adapters) <= MOST_ADAPTERS and all(map(_is_text, fingerprint.adapters)),
        f"fingerprint.adapters must be at most {MOST_ADAPTERS} strings of at most 1024 printable "
        "characters",
    )
    for name in ("rope", "vision"):
        message = f"fingerprint.{name} must be an object"
        require(isinstance(getattr(fingerprint, name), dict), message)


def _check_rules(recipe: object, keep: KeepRule) -> None:
    """Raise ProfileError unless recipe and keep rule are within bounds."""
    require(recipe in _RECIPES, f"unknown recipe {recipe!r}: expected one of {', '.join(_RECIPES)}")
    for name, low, high in (("sinks", 0, 4096), ("recent", 1, 65536), ("window", 1, 4096)):
        value = getattr(keep, name)
        message = f"keep.{name} must be an integer from {low} to {high}, found {value!r}"
        require(_is_int(value, low, high), message)


def _check_menu(strategies: tuple[Strategy, ...], kappas: tuple[float, ...]) -> None:
    """Raise ProfileError unless all strategies and kappas are within bounds."""
    require(1 <= len(strategies) <= 64, f"expected 1 to 64 strategies, found {len(strategies)}")
    for strategy in strategies:
        _check_strategy(strategy)
    require(
        len(kappas) <= 16 and all(_is_number(kappa) and 0 < kappa <= 1 for kappa in kappas),
        "kappas must lie in (0, 1], at most 16 of them",
    )


def _check_strategy(strategy: Strategy) -> None:
    whole = all(_is_int(v, 0, 65536) for v in (strategy.pool, strategy.chunk, strategy.bits))
    require(whole, f"strategy {strategy} has a size that is no integer in 0..65536")
    prior = strategy.text_prior
    require(_is_number(prior) and 0 <= prior <= 1, f"text_prior {prior!r} is not in [0, 1]")
    static = strategy.head_type is HeadType.STATIC
    widths = (4, 8, EXACT_BITS) if static else (8, EXACT_BITS)
    require(
        type(strategy.resident_bits) is int and strategy.resident_bits in widths,
        f"resident_bits {strategy.resident_bits!r} of a {strategy.head_type.name.lower()} strategy "
        f"is not one of {', '.join(map(str, widths))}",
    )
    known = isinstance(strategy.score, str) and strategy.score in SCORES
    require(known, f"unknown score {strategy.score!r}: expected one of {', '.join(SCORES)}")
    if static:
        require(strategy.pool % 2 == 1, f"pooling width {strategy.pool} must be odd")
        plain = strategy.index == "" and type(strategy.rerank) is int and strategy.rerank == 0
        require(plain, "a static strategy has neither index nor rerank")
        return
    require(strategy.score == WINDOW, "a dynamic strategy has no score of its own")
    known = isinstance(strategy.index, str) and strategy.index in _INDEXES
    require(known, f"unknown index {strategy.index!r}: expected one of {', '.join(_INDEXES)}")
    require(strategy.chunk >= 1, "chunk must be at least 1")
    require(
        strategy.index != "projected" or (strategy.bits in (16, 32, 64) and strategy.chunk == 1),
        "a projected index has 16, 32 or 64 bits per token and chunks of one token",
    )
    require(
        _is_int(strategy.rerank, 0, 4096)
        and (not strategy.rerank or strategy.index == "projected"),
        f"rerank {strategy.rerank!r} is not 0, and at most 4096 with a projected index",
    )


def check_ratios(ratios: NDArray[np.float32]) -> None:
    """Raise ProfileError unless the curves' abscissae [R] rise to 1."""
    sound = 1 <= len(ratios) <= MAX_RATIOS and bool((ratios > 0).all()) and ratios[-1] == 1
    require(
        sound and bool((np.diff(ratios) > 0).all()),
        f"ratios must rise strictly from above 0 to exactly 1, at most {MAX_RATIOS} of them",
    )


def check_lengths(lengths: NDArray[np.int64]) -> None:
    """Raise ProfileError unless the prompt lengths [A] of the curves are possible and rise."""
    require(
        1 <= len(lengths) <= MOST_LENGTHS, f"expected 1 to {MOST_LENGTHS} prompt lengths of curves"
    )
    require(
        bool((lengths >= 1).all())
        and bool((lengths <= MOST_TOKENS).all())
        and bool((lengths[1:] > lengths[:-1]).all()),
        "lengths must rise strictly from at least 1 token",
    )


@dataclass(frozen=True)
class ProvenanceReader:
    """Reads one record of a provenance, which anyone may have written, value by value.

    `key` is where the record stands in the provenance, `remedy` what makes a sound one. Everything
    raises ProfileError that names the value, what was expected and what was found.
    """

    key: str
    remedy: str

    def wrong(self, name: str, expected: str, found: object) -> ProfileError:
        """The error for a value called `name` that is something else than expected."""
        return ProfileError(
            f"provenance.{self.key}: expected {expected} as {name}, found {repr(found)[:60]}; "
            f"{self.remedy} again for a sound record"
        )

    def mapping(self, data: Any, name: str) -> dict[str, Any]:
        """A JSON object, copied."""
        if not isinstance(data, Mapping):
            raise self.wrong(name, "an object", data)
        return dict(data)

    def entries(self, data: Any, name: str, most: int) -> list[Any]:
        """A list that is not empty, of at most so many entries."""
        if not isinstance(data, list) or not 1 <= len(data) <= most:
            raise self.wrong(name, f"a list of 1 to {most} entries", data)
        return data

    def text(self, data: Any, name: str, least: int = 0) -> str:
        """A text of `least` to LONGEST_TEXT characters."""
        if not isinstance(data, str) or not least <= len(data) <= LONGEST_TEXT:
            raise self.wrong(name, f"a text of {least} to {LONGEST_TEXT} characters", data)
        return data

    def number(self, data: Any, name: str, low: float, high: float) -> float:
        """A finite number from `low` to `high`."""
        if not _is_number(data) or not math.isfinite(data) or not low <= data <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}", data)
        return float(data)

    def count(self, data: Any, name: str, least: int = 0) -> int:
        """A whole number of at least `least`."""
        if type(data) is not int or data < least:
            raise self.wrong(name, f"a whole number of at least {least}", data)
        return data


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and value.isprintable()


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
