"""What `hkvprof certify` found out, as a record: it stands in a profile's provenance.

A certificate says: with confidence 1 - delta, at most the share alpha of samples like those that
were tested degrades at the certified budget. It holds for the very content that was tested, of
which it keeps a digest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from hkvprof.errors import ProfileError

KEY = "certificate"
"""Where the record stands in a profile's provenance."""

LOSSES = {
    "answers": "a sample degrades when an answer scores less than the full cache's",
    "agreement": "a sample degrades when an answer differs from the full cache's",
}
MOST_ALPHA, MOST_DELTA = 0.5, 0.2
"""Beyond them the binomial tail does not bound samples of unequal risk (docs/certificate.md)."""
_MOST_LEVELS = 64
_LONGEST = 1024


@dataclass(frozen=True)
class Level:
    """One budget: `degraded` of the `samples` asked, and the p-value of a risk above alpha.

    With fewer samples than the certificate's it was given up, and the p-value is a lower bound of
    what it would have become.
    """

    budget: float
    samples: int
    degraded: int
    p_value: float


def fixed_sequence(levels: Sequence[Level], samples: int, delta: float) -> float | None:
    """The least budget that a fixed sequence of tests accepts; None where the first fails.

    Budgets are tested from the largest down, each at level delta, until one is not accepted: no
    correction for their number is needed (Learn then Test, arXiv 2110.01052, section 2.2).
    """
    accepted = None
    for level in levels:
        if level.samples < samples or level.p_value > delta:
            break
        accepted = level.budget
    return accepted


@dataclass(frozen=True)
class Certificate:
    """A claim, what it was tested on, and what came of it.

    `levels` are in the order of the tests, budgets falling. `certified` is None with a `reason`.
    `content` is the digest of what was tested (`Profile.content_digest`), `weights_digest` and
    `dtype` are of the model that ran, `data_digest` of the held-out samples. `full_score` is the
    full cache's mean score where answers were scored: a cache that is mostly wrong has little to
    lose. `options` and `versions` are what else the answers depend on.
    """

    alpha: float
    delta: float
    loss: str
    samples: int
    levels: tuple[Level, ...]
    certified: float | None
    reason: str
    regimes: tuple[str, ...]
    full_score: float | None
    content: str
    weights_digest: str
    dtype: str
    data: str
    data_digest: str
    options: Mapping[str, int]
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the inverse of `from_json`."""
        plain = asdict(self)
        return {**plain, "levels": list(plain["levels"]), "regimes": list(self.regimes)}

    @classmethod
    def from_json(cls, data: Any) -> Certificate:
        """Build from JSON, checked down to the verdict. Raises ProfileError."""
        data = _object(data, "the record")
        unknown = data.keys() ^ cls.__dataclass_fields__.keys()
        if unknown:
            raise _wrong("the record", "its own fields alone", sorted(unknown))
        samples = _count(data["samples"], "samples", 1)
        levels = _levels(data["levels"], samples)
        found = cls(
            alpha=_number(data["alpha"], "alpha", 0, MOST_ALPHA),
            delta=_number(data["delta"], "delta", 0, MOST_DELTA),
            loss=_text(data["loss"], "loss"),
            samples=samples,
            levels=levels,
            certified=data["certified"],
            reason=_text(data["reason"], "reason"),
            regimes=tuple(_text(name, "regimes") for name in _list(data["regimes"], "regimes")),
            full_score=_optional(data["full_score"], "full_score"),
            **{name: _text(data[name], name) for name in _TEXTS},
            options={k: _count(v, k, 0) for k, v in _object(data["options"], "options").items()},
            versions={k: _text(v, k) for k, v in _object(data["versions"], "versions").items()},
        )
        if found.loss not in LOSSES:
            raise _wrong("loss", f"one of {', '.join(LOSSES)}", found.loss)
        verdict = fixed_sequence(levels, samples, found.delta)
        if found.certified != verdict or isinstance(found.certified, bool):
            raise _wrong("certified", f"{verdict} by its own levels", found.certified)
        if bool(found.reason) is not (verdict is None):
            raise _wrong("reason", "a reason if and only if nothing is certified", found.reason)
        return found


_TEXTS = ("content", "weights_digest", "dtype", "data", "data_digest")


def recorded(provenance: Mapping[str, Any]) -> Certificate | None:
    """The record in a provenance, checked; None where there is none. Raises ProfileError."""
    return Certificate.from_json(provenance[KEY]) if KEY in provenance else None


def _wrong(name: str, expected: str, found: object) -> ProfileError:
    return ProfileError(
        f"provenance.{KEY}: expected {expected} as {name}, found {repr(found)[:60]}; run `hkvprof "
        "certify` again for a sound record"
    )


def _object(data: Any, name: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise _wrong(name, "an object", data)
    return dict(data)


def _list(data: Any, name: str) -> list[Any]:
    if not isinstance(data, list) or not 1 <= len(data) <= _MOST_LEVELS:
        raise _wrong(name, f"a list of 1 to {_MOST_LEVELS} entries", data)
    return data


def _text(data: Any, name: str) -> str:
    if not isinstance(data, str) or len(data) > _LONGEST:
        raise _wrong(name, f"a text of at most {_LONGEST} characters", data)
    return data


def _number(data: Any, name: str, low: float, high: float) -> float:
    plain = isinstance(data, int | float) and not isinstance(data, bool)
    if not plain or not math.isfinite(data) or not low <= data <= high:
        raise _wrong(name, f"a number from {low:g} to {high:g}", data)
    return float(data)


def _optional(data: Any, name: str) -> float | None:
    return None if data is None else _number(data, name, 0, 1)


def _count(data: Any, name: str, least: int) -> int:
    if type(data) is not int or data < least:
        raise _wrong(name, f"a number of at least {least}", data)
    return data


def _levels(data: Any, samples: int) -> tuple[Level, ...]:
    levels = []
    for entry in _list(data, "levels"):
        entry = _object(entry, "levels")
        if entry.keys() != Level.__dataclass_fields__.keys():
            raise _wrong("levels", f"entries of {', '.join(Level.__dataclass_fields__)}", entry)
        asked = _count(entry["samples"], "levels.samples", 0)
        level = Level(
            _number(entry["budget"], "levels.budget", 0, 1),
            asked,
            _count(entry["degraded"], "levels.degraded", 0),
            _number(entry["p_value"], "levels.p_value", 0, 1),
        )
        if not level.degraded <= asked <= samples:
            raise _wrong("levels", f"degraded <= samples <= {samples}", entry)
        levels.append(level)
    budgets = [level.budget for level in levels]
    if any(low >= high for high, low in pairwise(budgets)):
        raise _wrong("levels", "falling budgets", budgets)
    return tuple(levels)
