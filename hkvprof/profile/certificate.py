"""What `hkvprof certify` found out, as a record: it stands in a profile's provenance.

A certificate says: with confidence 1 - delta, at most the share alpha of samples like those that
were tested degrades at the certified budget. It holds for the very content that was tested, of
which it keeps a digest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from hkvprof.profile.bounds import ProvenanceReader

KEY = "certificate"
"""Where the record stands in a profile's provenance."""

LOSSES = {
    "answers": "a sample degrades when an answer scores less than the full cache's",
    "agreement": "a sample degrades when an answer differs from the full cache's",
}
MOST_ALPHA, MOST_DELTA = 0.5, 0.2
"""Beyond them the binomial tail does not bound samples of unequal risk (docs/certificate.md)."""
_MOST_LEVELS = 64
_READ = ProvenanceReader(KEY, "run `hkvprof certify`")


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
    lose. `fetch` is what a step could read from the host (budgets.Fetch), `options` and `versions`
    are what else the answers depend on.
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
    fetch: str = "unlimited"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the inverse of `from_json`."""
        plain = asdict(self)
        return {**plain, "levels": list(plain["levels"]), "regimes": list(self.regimes)}

    @classmethod
    def from_json(cls, data: Any) -> Certificate:
        """Build from JSON, checked down to the verdict. Raises ProfileError."""
        data = {"fetch": cls.fetch, **_READ.mapping(data, "the record")}
        unknown = data.keys() ^ cls.__dataclass_fields__.keys()
        if unknown:
            raise _READ.wrong("the record", "its own fields alone", sorted(unknown))
        samples, score = _READ.count(data["samples"], "samples", 1), data["full_score"]
        levels = _levels(data["levels"], samples)
        regimes = _READ.entries(data["regimes"], "regimes", _MOST_LEVELS)
        options, versions = (_READ.mapping(data[name], name) for name in ("options", "versions"))
        certificate = cls(
            alpha=_READ.number(data["alpha"], "alpha", 0, MOST_ALPHA),
            delta=_READ.number(data["delta"], "delta", 0, MOST_DELTA),
            loss=_READ.text(data["loss"], "loss"),
            samples=samples,
            levels=levels,
            certified=data["certified"],
            reason=_READ.text(data["reason"], "reason"),
            regimes=tuple(_READ.text(name, "regimes") for name in regimes),
            full_score=None if score is None else _READ.number(score, "full_score", 0, 1),
            **{name: _READ.text(data[name], name) for name in _TEXTS},
            options={name: _READ.count(value, name) for name, value in options.items()},
            versions={name: _READ.text(value, name) for name, value in versions.items()},
        )
        if certificate.loss not in LOSSES:
            raise _READ.wrong("loss", f"one of {', '.join(LOSSES)}", certificate.loss)
        verdict = fixed_sequence(levels, samples, certificate.delta)
        if certificate.certified != verdict or isinstance(certificate.certified, bool):
            raise _READ.wrong("certified", f"{verdict} by its own levels", certificate.certified)
        if bool(certificate.reason) is not (verdict is None):
            raise _READ.wrong(
                "reason", "a reason if and only if nothing is certified", certificate.reason
            )
        return certificate


_TEXTS = ("content", "weights_digest", "dtype", "data", "data_digest", "fetch")


def recorded(provenance: Mapping[str, Any]) -> Certificate | None:
    """The record in a provenance, checked; None where there is none. Raises ProfileError."""
    return Certificate.from_json(provenance[KEY]) if KEY in provenance else None


def _levels(data: Any, samples: int) -> tuple[Level, ...]:
    levels = []
    for entry in _READ.entries(data, "levels", _MOST_LEVELS):
        entry = _READ.mapping(entry, "levels")
        if entry.keys() != Level.__dataclass_fields__.keys():
            raise _READ.wrong(
                "levels", f"entries of {', '.join(Level.__dataclass_fields__)}", entry
            )
        asked = _READ.count(entry["samples"], "levels.samples", 0)
        level = Level(
            _READ.number(entry["budget"], "levels.budget", 0, 1),
            asked,
            _READ.count(entry["degraded"], "levels.degraded", 0),
            _READ.number(entry["p_value"], "levels.p_value", 0, 1),
        )
        if not level.degraded <= asked <= samples:
            raise _READ.wrong("levels", f"degraded <= samples <= {samples}", entry)
        levels.append(level)
    budgets = [level.budget for level in levels]
    if any(low >= high for high, low in pairwise(budgets)):
        raise _READ.wrong("levels", "falling budgets", budgets)
    return tuple(levels)
