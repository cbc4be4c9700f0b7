"""The doctor's report as text, to read and to paste into a bug report."""

from __future__ import annotations

import json
from collections.abc import Iterator

from hkvprof.doctor.records import Outcome, Report, Status

_MARKS = {Status.PASSED: "ok", Status.FAILED: "FAILED", Status.NOT_APPLICABLE: "n/a"}
_PASTE = "Something is wrong: please report it with all of these lines."


def text(report: Report, model: str) -> str:
    """The whole report: environment, a line per check, causes of failures, the verdict."""
    return "\n".join(_lines(report, model))


def _lines(report: Report, model: str) -> Iterator[str]:
    yield f"hkvprof doctor: {model}"
    yield ""
    width = max(len(outcome.name) for outcome in report.outcomes)
    for outcome in report.outcomes:
        yield from _outcome(outcome, width)
    if report.profile is not None:
        yield ""
        for line in report.profile.mismatches:
            yield f"the profile is of another model (profile != model): {line}"
        for line in report.profile.notes:
            yield f"the profile fits the model, but {line}"
        if not report.profile.mismatches + report.profile.notes:
            yield "the profile is this model's"
    yield ""
    yield "model"
    for key, value in report.fingerprint.items():
        yield f"  {key}: {value if isinstance(value, str) else json.dumps(value)}"
    yield "environment"
    for key, value in report.environment.items():
        yield f"  {key}: {value}"
    yield ""
    yield verdict(report)


def _outcome(outcome: Outcome, width: int) -> Iterator[str]:
    mark = _MARKS[outcome.status]
    yield f"{mark:<6}  {outcome.name:<{width}}  {outcome.seconds:5.1f} s  {outcome.detail}"
    if outcome.cause:
        yield f"{'':<6}  {'':<{width}}           likely cause: {outcome.cause}"


def verdict(report: Report) -> str:
    """The last line of the report: whether hkvprof can be used on this model here."""
    counts = dict.fromkeys(Status, 0)
    for outcome in report.outcomes:
        counts[outcome.status] += 1
    said = (
        f"{counts[Status.PASSED]} passed, {counts[Status.FAILED]} failed, "
        f"{counts[Status.NOT_APPLICABLE]} not applicable, "
        f"{sum(outcome.seconds for outcome in report.outcomes):.0f} s."
    )
    if report.failures:
        return f"{said} {_PASTE}"
    if report.approved:
        return f"{said} This architecture may be used from now on, with these versions."
    return said
