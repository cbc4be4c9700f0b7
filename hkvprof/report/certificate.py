"""A profile's certificate in words. Pure functions."""

from __future__ import annotations

from typing import Any

from hkvprof.artifact import Profile
from hkvprof.certificate import Certificate, Level, recorded
from hkvprof.report.certainty import plain

_UNITS = {
    "answers": "of samples like these get a worse answer than with the full cache",
    "agreement": "of samples like these get another answer than with the full cache",
}


def claim_text(alpha: float, delta: float, loss: str) -> str:
    """What a certificate says, as a sentence without its end."""
    return f"with {100 * (1 - delta):g}% confidence, at most {100 * alpha:g}% {_UNITS[loss]}"


def page(found: Certificate) -> list[str]:
    """The verdict and the tests behind it."""
    return [_verdict(found), *(f"  {line}" for line in [_about(found), *_table(found)])]


def section(profile: Profile) -> list[str]:
    """The section of `inspect`; empty without a record."""
    found = recorded(profile.provenance)
    if found is None:
        return []
    if not found.covers(profile):
        return ["Certificate: none; the one recorded is of other curves, budgets or tables"]
    return page(found)


def certificate_json(profile: Profile) -> dict[str, Any] | None:
    """For `inspect --json`: the record, and whether it is of this very content."""
    found = recorded(profile.provenance)
    return None if found is None else {**found.to_json(), "valid": found.covers(profile)}


def _verdict(found: Certificate) -> str:
    claim = claim_text(found.alpha, found.delta, found.loss)
    if found.certified is None:
        return f"Certificate: nothing certified ({claim}): {plain(found.reason)}"
    return f"Certificate: {100 * found.certified:g}%: {claim}"


def _about(found: Certificate) -> str:
    full = "" if found.full_score is None else f"; full cache {found.full_score:.1%} right"
    return (
        f"{found.samples} held-out samples of {plain(found.data)}, regimes "
        f"{plain(list(found.regimes))}, {plain(found.dtype)}{full}"
    )


def _table(found: Certificate) -> list[str]:
    lines = ["budget  samples  degraded  p-value"]
    passed = found.certified is not None
    for level in found.levels:
        lines.append(
            f"{f'{100 * level.budget:g}%':>6}  {level.samples:>7}  {level.degraded:>8}  "
            f"{_p_value(found, level):>7}  {_remark(found, level, passed)}".rstrip()
        )
        passed = passed and level.budget != found.certified
    return lines


def _p_value(found: Certificate, level: Level) -> str:
    return f"{'' if level.samples == found.samples else '>='}{level.p_value:.2g}"


def _remark(found: Certificate, level: Level, passed: bool) -> str:
    if passed:
        return "accepted"
    return "" if level.samples == found.samples else "given up: no verdict depends on the rest"
